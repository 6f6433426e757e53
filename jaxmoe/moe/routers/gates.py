"""Gates: the part of a router with parameters, from a token to a logit for every expert.

A gate is a record; `build` gives a module that is called as `gate(x_TD, carry)` and returns
float32 logits (T, E) and the carry of the next layer. To add one, add one line to GATES.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.errors import InputError
from jaxmoe.core.parameters import Init
from jaxmoe.core.weights import dot


@dataclasses.dataclass(frozen=True)
class Linear:
  """x W (Shazeer et al. 2017, equation 3)."""

  carries = False

  def build(self, init: Init, dim: int, num_experts: int) -> LinearGate:
    """Returns the module with its (D, E) weight."""
    return LinearGate(init, dim, num_experts)

  def num_params(self, dim: int, num_experts: int) -> int:
    """Returns the number of parameters."""
    return dim * num_experts


class LinearGate(nnx.Module):
  """The weight of a `Linear` gate."""

  def __init__(self, init: Init, dim: int, num_experts: int):
    self.weight = init.weight("weight", (dim, num_experts), ("embed", "expert"), fan_in=dim)

  def __call__(self, x_TD: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
    """Returns float32 logits (T, E) and the carry as it came."""
    return dot(self.weight.get_value(), x_TD.astype(jnp.float32), "td,de->te"), carry


@dataclasses.dataclass(frozen=True)
class MLP:
  """A two-layer gate, A act(B x) without biases.

  Attributes:
    hidden: Width between the two products.
    activation: `gelu` (ModuleFormer, Shen et al. 2023, equation 2, as released) or `tanh` (MoE++,
      Jin et al. 2024, as released, of width 8 E).
  """

  hidden: int = 256
  activation: str = "gelu"
  carries = False

  def __post_init__(self) -> None:
    if self.hidden < 1:
      raise InputError(f"hidden must be at least 1: hidden={self.hidden}")
    if self.activation not in ACTIVATIONS:
      raise InputError(
        f"activation must be one of {', '.join(ACTIVATIONS)}: activation={self.activation!r}"
      )

  def build(self, init: Init, dim: int, num_experts: int) -> MLPGate:
    """Returns the module with its two weights."""
    return MLPGate(self, init, dim, num_experts)

  def num_params(self, dim: int, num_experts: int) -> int:
    """Returns the number of parameters."""
    return self.hidden * (dim + num_experts)


ACTIVATIONS = {"gelu": jax.nn.gelu, "tanh": jnp.tanh}


class MLPGate(nnx.Module):
  """The weights of an `MLP` gate."""

  def __init__(self, config: MLP, init: Init, dim: int, num_experts: int):
    self.act = ACTIVATIONS[config.activation]
    hidden = config.hidden
    self.up = init.weight("up", (dim, hidden), ("embed", "mlp"), fan_in=dim)
    self.weight = init.weight("weight", (hidden, num_experts), ("mlp", "expert"), fan_in=hidden)

  def __call__(self, x_TD: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
    """Returns float32 logits (T, E) and the carry as it came."""
    hidden_TH = self.act(dot(self.up.get_value(), x_TD.astype(jnp.float32), "td,dh->th"))
    return dot(self.weight.get_value(), hidden_TH, "th,he->te"), carry


GATES = {
  "linear": (Linear, Linear()),
  "mlp": (MLP, MLP(hidden=16)),
}
