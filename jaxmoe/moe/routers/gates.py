"""Gates: the part of a router with parameters, from a token to a logit for every expert.

A gate is a record; `build` gives a module that is called as `gate(x_TD, previous_logits)` and
returns float32 logits (T, E) and the logits for the next layer. To add one, add one line to
GATES.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.config_io import added, choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.renamed import renamed
from jaxmoe.core.weight_formats import dot
from jaxmoe.moe.routers.gate_base import GateConfig
from jaxmoe.moe.routers.tree import TreeGateConfig


@dataclasses.dataclass(frozen=True)
class LinearGateConfig(GateConfig):
  """x W (Shazeer et al. 2017, equation 3).

  Attributes:
    bias: Whether each expert has a learnt logit beside it (gpt-oss).
  """

  bias: bool = False

  def build(self, init: Init, dim: int, num_experts: int) -> LinearGate:
    """Returns the module with its (D, E) weight."""
    return LinearGate(self, init, dim, num_experts)

  def num_params(self, dim: int, num_experts: int) -> int:
    """Returns the number of parameters."""
    return (dim + self.bias) * num_experts


class LinearGate(nnx.Module):
  """The weight of a `LinearGateConfig` gate, and its bias."""

  def __init__(self, config: LinearGateConfig, init: Init, dim: int, num_experts: int):
    self.weight = init.weight("weight", (dim, num_experts), ("embed", "expert"), fan_in=dim)
    # Where experts are spread, gates are not.
    self.bias = init.zeros((num_experts,), ("local_expert",)) if config.bias else None

  def __call__(self, x_TD: jax.Array, previous_logits: Any) -> tuple[jax.Array, Any]:
    """Returns float32 logits (T, E) and `previous_logits` as they came."""
    logits_TE = dot(self.weight.get_value(), x_TD.astype(jnp.float32), "td,de->te")
    if self.bias is not None:
      logits_TE = logits_TE + self.bias.get_value().astype(jnp.float32)[None]
    return logits_TE, previous_logits


@dataclasses.dataclass(frozen=True)
class MLPGateConfig(GateConfig):
  """A two-layer gate, A act(B x + b).

  As released, ModuleFormer (Shen et al. 2023, equation 2; there with dropout behind the gelu) has
  `gelu` and the bias, MoE++ (Jin et al. 2024) `tanh` of width 8 E and no bias.

  Attributes:
    mlp_dim: Width between the two products.
    activation: `gelu` or `tanh`.
    bias: Whether hidden units have a learnt b.
    approximate: Whether gelu is its approximation by a tanh; else by the error function.
  """

  mlp_dim: int = renamed("hidden", 256)
  activation: str = "gelu"
  bias: bool = added(True, before=False)
  approximate: bool = added(False, before=True)

  def __post_init__(self) -> None:
    if self.mlp_dim < 1:
      raise InputError(f"mlp_dim must be at least 1: mlp_dim={self.mlp_dim}")
    if self.activation not in ACTIVATIONS:
      raise InputError(
        f"activation must be one of {', '.join(ACTIVATIONS)}: activation={self.activation!r}"
      )

  def build(self, init: Init, dim: int, num_experts: int) -> MLPGate:
    """Returns the module with its two weights, and its bias."""
    return MLPGate(self, init, dim, num_experts)

  def num_params(self, dim: int, num_experts: int) -> int:
    """Returns the number of parameters."""
    return self.mlp_dim * (dim + self.bias + num_experts)


ACTIVATIONS = ("gelu", "tanh")


class MLPGate(nnx.Module):
  """The weights of an `MLPGateConfig` gate, and its bias."""

  def __init__(self, config: MLPGateConfig, init: Init, dim: int, num_experts: int):
    gelu = functools.partial(jax.nn.gelu, approximate=config.approximate)
    self.act: Callable[[jax.Array], jax.Array] = jnp.tanh if config.activation == "tanh" else gelu
    width = config.mlp_dim
    self.up = init.weight("up", (dim, width), ("embed", "hidden"), fan_in=dim)
    self.up_bias = init.zeros((width,), ("hidden",)) if config.bias else None
    self.weight = init.weight("weight", (width, num_experts), ("hidden", "expert"), fan_in=width)

  def __call__(self, x_TD: jax.Array, previous_logits: Any) -> tuple[jax.Array, Any]:
    """Returns float32 logits (T, E) and `previous_logits` as they came."""
    hidden_TH = dot(self.up.get_value(), x_TD.astype(jnp.float32), "td,dh->th")
    if self.up_bias is not None:
      hidden_TH = hidden_TH + self.up_bias.get_value().astype(jnp.float32)[None]
    return dot(self.weight.get_value(), self.act(hidden_TH), "th,he->te"), previous_logits


@dataclasses.dataclass(frozen=True)
class CosineGateConfig(GateConfig):
  """Cosines in a low dimension over a learnt temperature (X-MoE, arXiv:2204.09179; Tutel).

  Attributes:
    width: The dimension (X-MoE: E / 2, Tutel: 256).
    temperature: What cosines are divided by at first.
    least: The temperature never falls below it, and has no gradient there.
  """

  width: int = 256
  temperature: float = 0.3
  least: float = 0.01

  def __post_init__(self) -> None:
    if self.width < 1 or not 0 < self.least <= self.temperature:
      raise InputError(
        "width must be at least 1, and 0 < least <= temperature: "
        f"width={self.width}, least={self.least}, temperature={self.temperature}"
      )

  def build(self, init: Init, dim: int, num_experts: int) -> CosineGate:
    """Returns the module with its projection, the experts' directions and the temperature."""
    return CosineGate(self, init, dim, num_experts)

  def num_params(self, dim: int, num_experts: int) -> int:
    """Returns the number of parameters."""
    return self.width * (dim + num_experts) + 1


class CosineGate(nnx.Module):
  """The weights of a `CosineGateConfig` gate; `sharpness` is the logarithm of 1 / temperature."""

  def __init__(self, config: CosineGateConfig, init: Init, dim: int, num_experts: int):
    self.most, width = -math.log(config.least), config.width
    self.down = init.weight("down", (dim, width), ("embed", None), fan_in=dim)
    self.weight = init.weight("weight", (width, num_experts), (None, "expert"), fan_in=width)
    self.sharpness = init.full((1,), -math.log(config.temperature), (None,))

  def __call__(self, x_TD: jax.Array, previous_logits: Any) -> tuple[jax.Array, Any]:
    """Returns float32 logits (T, E) and `previous_logits` as they came."""
    low_TP = _unit(dot(self.down.get_value(), x_TD.astype(jnp.float32), "td,dp->tp"), axis=1)
    weight_PE = _unit(self.weight.get_value().astype(jnp.float32), axis=0)
    sharpness_1 = jnp.minimum(self.sharpness.get_value().astype(jnp.float32), self.most)
    return dot(weight_PE, low_TP, "tp,pe->te") * jnp.exp(sharpness_1)[None], previous_logits


def _unit(x: jax.Array, axis: int) -> jax.Array:
  """Returns x over its norm along `axis`; zeros stay zeros and have no gradient that is not."""
  square = jnp.sum(x * x, axis=axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


ALONE = {
  "linear": (LinearGateConfig, LinearGateConfig()),
  "mlp": (MLPGateConfig, MLPGateConfig(mlp_dim=16)),
  "cosine": (CosineGateConfig, CosineGateConfig(width=8)),
}


@dataclasses.dataclass(frozen=True)
class ResidualGateConfig(GateConfig):
  """G(x) = inner(x) + W_g G'(x), G' of the layer before (MoE++, Jin et al. 2024, equation 6).

  The layer before is the last one whose gate is residual: others in between, dense or not, hand
  its logits on. The first has none. W_g starts at zero.

  Attributes:
    inner: The gate without the residual (`mlp` with tanh and no bias as released).
  """

  inner: Any = choice(ALONE, LinearGateConfig())

  reads_previous: ClassVar[bool] = True
  separable: ClassVar[bool] = False

  def build(self, init: Init, dim: int, num_experts: int) -> ResidualGate:
    """Returns the module with W_g beside the inner gate."""
    return ResidualGate(self, init, dim, num_experts)

  def num_params(self, dim: int, num_experts: int) -> int:
    """Returns the number of parameters."""
    return self.inner.num_params(dim, num_experts) + num_experts**2


class ResidualGate(nnx.Module):
  """The weights of a `ResidualGateConfig` gate."""

  def __init__(self, config: ResidualGateConfig, init: Init, dim: int, num_experts: int):
    self.inner = config.inner.build(init / "inner", dim, num_experts)
    self.residual = init.zeros((num_experts, num_experts), (None, "expert"))

  def __call__(self, x_TD: jax.Array, previous_logits: Any) -> tuple[jax.Array, Any]:
    """Returns float32 logits (T, E), twice; `previous_logits` is None, or logits of zero in a
    stack."""
    logits_TE, _ = self.inner(x_TD, None)
    if previous_logits is not None:
      logits_TE = logits_TE + dot(self.residual.get_value(), previous_logits, "te,ef->tf")
    return logits_TE, logits_TE


GATES = {
  **ALONE,
  "residual": (ResidualGateConfig, ResidualGateConfig()),
  "tree": (TreeGateConfig, TreeGateConfig()),
}
