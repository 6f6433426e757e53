"""SwiGLU feed-forward experts: down(silu(gate(x)) * up(x)) (Shazeer 2020, equation 6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.weight_formats import Groups, dot, grouped_dot, is_plain
from jaxmoe.moe.experts.family import ExpertFamily, FeedForward


def swiglu(gate_up_GF: jax.Array) -> jax.Array:
  """Returns silu(gate) * up for (..., 2, F) -> (..., F), in float32 inside."""
  gate, up = gate_up_GF[..., 0, :], gate_up_GF[..., 1, :]
  gated = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
  return gated.astype(gate_up_GF.dtype)


@dataclasses.dataclass(frozen=True)
class PlainWeights:
  """What a fused back end reads: (S, D, G, F), or (S, D, F), and (S, F, D), and what is between."""

  gate_up: jax.Array
  down: jax.Array
  activation: Callable[[jax.Array], jax.Array]

  @property
  def gated_shape(self) -> tuple[int, int, int, int]:
    """(S, D, G, F), with G = 1 of experts without gates."""
    slots, dim, *gates, width = self.gate_up.shape
    return slots, dim, gates[0] if gates else 1, width


@dataclasses.dataclass(frozen=True)
class SwiGLU(FeedForward):
  """SwiGLU experts."""

  matrices: ClassVar[int] = 3

  def build(self, init: Init, dim: int, num_experts: int) -> SwiGLUExperts:
    """Returns the module with the weights of all experts."""
    return SwiGLUExperts(init, dim, self.mlp_dim, num_experts)


class SwiGLUExperts(ExpertFamily):
  """The weights of E SwiGLU experts, gate and up side by side so that one product makes both."""

  def __init__(self, init: Init, dim: int, mlp_dim: int, num_experts: int):
    shape = (num_experts, dim, 2, mlp_dim)
    self.gate_up = init.weight("gate_up", shape, ("expert", "embed", "gate", "mlp"), fan_in=dim)
    shape_down = (num_experts, mlp_dim, dim)
    self.down = init.residual("down", shape_down, ("expert", "mlp", "embed"), fan_in=mlp_dim)

  def __call__(self, rows_RD: jax.Array, groups: Groups) -> jax.Array:
    """Returns (R, D) in rows.dtype."""
    gate_up_RGF = grouped_dot(self.gate_up.get_value(), rows_RD, groups)
    return grouped_dot(self.down.get_value(), swiglu(gate_up_RGF), groups)

  def plain_weights(self) -> PlainWeights | None:
    """Returns the weights if they are plain arrays, so that a fused back end may read them."""
    gate_up, down = self.gate_up.get_value(), self.down.get_value()
    return PlainWeights(gate_up, down, swiglu) if is_plain(gate_up, down) else None


class SwiGLUMLP(nnx.Module):
  """One SwiGLU network for every token: the dense layer, and the shared expert."""

  def __init__(self, init: Init, dim: int, mlp_dim: int):
    self.gate_up = init.weight("gate_up", (dim, 2, mlp_dim), ("embed", "gate", "mlp"), fan_in=dim)
    self.down = init.residual("down", (mlp_dim, dim), ("mlp", "embed"), fan_in=mlp_dim)

  def __call__(self, x_TD: jax.Array) -> jax.Array:
    """Returns (..., D) in x.dtype."""
    gate_up = dot(self.gate_up.get_value(), x_TD, "...d,dgf->...gf")
    return dot(self.down.get_value(), swiglu(gate_up), "...f,fd->...d")
