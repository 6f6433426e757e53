"""Feed-forward experts of two matrices: down(f(up(x))), without biases.

GELU: Hendrycks and Gimpel 2016, x Phi(x) by the error function, as Switch and ModuleFormer use it.
Squared ReLU: So et al. 2021 (Primer, arXiv:2109.08668), section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmoe.core.init import Init
from jaxmoe.core.weight_formats import Groups, grouped_dot, is_plain
from jaxmoe.moe.experts.family import ExpertFamily, FeedForward
from jaxmoe.moe.experts.swiglu import PlainWeights

Activation = Callable[[jax.Array], jax.Array]


def gelu(pre_GF: jax.Array) -> jax.Array:
  """Returns x Phi(x) for (..., 1, F) -> (..., F), in float32 inside."""
  return jax.nn.gelu(pre_GF[..., 0, :].astype(jnp.float32), approximate=False).astype(pre_GF.dtype)


def relu_squared(pre_GF: jax.Array) -> jax.Array:
  """Returns max(x, 0)^2 for (..., 1, F) -> (..., F), in float32 inside."""
  return jnp.square(jax.nn.relu(pre_GF[..., 0, :].astype(jnp.float32))).astype(pre_GF.dtype)


@dataclasses.dataclass(frozen=True)
class PlainMLP(FeedForward):
  """The base of experts of two matrices."""

  matrices: ClassVar[int] = 2
  activation: ClassVar[Activation]

  def build(self, init: Init, dim: int, num_experts: int) -> MLPExperts:
    """Returns the module with the weights of all experts."""
    return MLPExperts(init, dim, self.mlp_dim, num_experts, type(self).activation)


@dataclasses.dataclass(frozen=True)
class GELU(PlainMLP):
  """GELU experts."""

  activation: ClassVar[Activation] = staticmethod(gelu)


@dataclasses.dataclass(frozen=True)
class ReLUSquared(PlainMLP):
  """Squared ReLU experts."""

  activation: ClassVar[Activation] = staticmethod(relu_squared)


class MLPExperts(ExpertFamily):
  """The weights of E experts of two matrices.

  `view` says what products see of a weight: the weight itself, or numbers of a coarser kind.
  """

  def __init__(
    self,
    init: Init,
    dim: int,
    mlp_dim: int,
    num_experts: int,
    activation: Activation,
    view: Callable[[Any], Any] | None = None,
  ):
    shape_up, shape_down = (num_experts, dim, mlp_dim), (num_experts, mlp_dim, dim)
    # What a view sees of one number may depend on others of its row, so they stay together.
    mlp = "mlp" if view is None else "width"
    self.up = init.weight("up", shape_up, ("expert", "embed", mlp), fan_in=dim)
    self.down = init.residual("down", shape_down, ("expert", mlp, "embed"), fan_in=mlp_dim)
    self.activation, self.view = activation, view

  def __call__(self, rows_RD: jax.Array, groups: Groups) -> jax.Array:
    """Returns (R, D) in rows.dtype."""
    up, down = self._seen()
    pre_RF = grouped_dot(up, rows_RD, groups)
    return grouped_dot(down, self.activation(pre_RF[:, None]), groups)

  def plain_weights(self) -> PlainWeights | None:
    """Returns the weights if they are plain arrays, so that a fused back end may read them."""
    up, down = self._seen()
    return PlainWeights(up, down, self.activation) if is_plain(up, down) else None

  def _seen(self) -> tuple[Any, Any]:
    see = self.view or (lambda weight: weight)
    return see(self.up.get_value()), see(self.down.get_value())
