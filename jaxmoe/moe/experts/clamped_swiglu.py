"""SwiGLU whose halves are cut off, with biases (gpt-oss, OpenAI 2025, arXiv:2508.10925).

  down((up + 1) * gate * sigmoid(alpha gate)) + bias,

where gate and up have biases too, gate is at most `limit` and up lies within it on both sides. The
reports do not say so: it is in the released code.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.layout import ONCE
from jaxmoe.core.weight_formats import Groups, grouped_dot
from jaxmoe.moe.experts.family import ExpertFamily, FeedForward


@dataclasses.dataclass(frozen=True)
class ClampedSwiGLU(FeedForward):
  """SwiGLU experts with limits and biases.

  Attributes:
    limit: Where gate is cut off above, and up on both sides.
    alpha: What gate is multiplied by inside the sigmoid.
  """

  limit: float = 7.0
  alpha: float = 1.702

  matrices: ClassVar[int] = 3

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.limit <= 0:
      raise InputError(f"limit must be above 0: limit={self.limit}")

  def expert_params(self, dim: int, num_experts: int) -> tuple[int, ...]:
    """Returns the same number for every expert, biases included."""
    return (3 * dim * self.mlp_dim + 2 * self.mlp_dim + dim,) * num_experts

  def build(self, init: Init, dim: int, num_experts: int) -> ClampedSwiGLUExperts:
    """Returns the module with the weights of all experts."""
    return ClampedSwiGLUExperts(self, init, dim, num_experts)


class ClampedSwiGLUExperts(ExpertFamily):
  """The weights of E experts; no fused back end knows of biases, so it offers none."""

  def __init__(self, config: ClampedSwiGLU, init: Init, dim: int, num_experts: int):
    self.config, mlp_dim = config, config.mlp_dim
    shape = (num_experts, dim, 2, mlp_dim)
    self.gate_up = init.weight("gate_up", shape, ("expert", "embed", "gate", "mlp"), fan_in=dim)
    self.gate_up_bias = init.zeros((num_experts, 2, mlp_dim), ("expert", "gate", "mlp"))
    shape_down = (num_experts, mlp_dim, dim)
    self.down = init.residual("down", shape_down, ("expert", "mlp", "embed"), fan_in=mlp_dim)
    self.down_bias = init.zeros((num_experts, dim), ("expert", ONCE))

  def __call__(self, rows_RD: jax.Array, groups: Groups) -> jax.Array:
    """Returns (R, D) in rows.dtype; zeros where a row has no slot."""
    pre_RGF = grouped_dot(self.gate_up.get_value(), rows_RD, groups)
    pre_RGF = pre_RGF + _of_rows(self.gate_up_bias, rows_RD, groups)
    out_RD = grouped_dot(self.down.get_value(), self._activation(pre_RGF), groups)
    return out_RD + _of_rows(self.down_bias, rows_RD, groups)

  def _activation(self, pre_RGF: jax.Array) -> jax.Array:
    """Returns (R, F), in float32 inside."""
    limit = self.config.limit
    gate_RF, up_RF = pre_RGF[:, 0].astype(jnp.float32), pre_RGF[:, 1].astype(jnp.float32)
    gate_RF, up_RF = jnp.minimum(gate_RF, limit), jnp.clip(up_RF, -limit, limit)
    glu_RF = gate_RF * jax.nn.sigmoid(self.config.alpha * gate_RF)
    return ((up_RF + 1) * glu_RF).astype(pre_RGF.dtype)


def _of_rows(bias: nnx.Param, rows_RD: jax.Array, groups: Groups) -> jax.Array:
  """Returns (R, ...) in rows.dtype: the bias of each row's slot, as 1 times a matrix of one row."""
  ones_R1 = jnp.ones((rows_RD.shape[0], 1), rows_RD.dtype)
  return grouped_dot(bias.get_value()[:, None], ones_R1, groups)
