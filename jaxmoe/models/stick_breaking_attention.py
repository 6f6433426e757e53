"""Stick-breaking attention as a kind: no softmax, no positions (ModuleFormer, section 2.2)."""

from __future__ import annotations

import dataclasses

import jax

from jaxmoe.core.init import Init
from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.models.attention_base import AttentionBase, AttentionBaseLayer
from jaxmoe.ops.attention import Sight, attend
from jaxmoe.ops.stick_breaking import BACKENDS


@dataclasses.dataclass(frozen=True)
class StickBreaking(AttentionBase):
  """Near keys take their share first; the order of tokens is known from nothing else."""

  def build(
    self,
    init: Init,
    dim: int,
    eps: float,
    num_experts: int = 0,
    parallel: ParallelContext = ONE_DEVICE,
  ) -> StickBreakingLayer:
    """Returns the module with its weights."""
    del eps
    return StickBreakingLayer(self, init, dim, num_experts, parallel)


class StickBreakingLayer(AttentionBaseLayer):
  """The weights of stick-breaking attention."""

  def attend(
    self, q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, sight: Sight
  ) -> jax.Array:
    """Returns (B, L, N, H), what queries find among keys."""
    sight = dataclasses.replace(sight, scale=q_BLNH.shape[-1] ** -0.5)
    part = attend(self.chooser, ("stick_breaking", BACKENDS), q_BLNH, k_BSKH, v_BSKH, sight)
    return part.out_BLNP.astype(q_BLNH.dtype)
