"""Stick-breaking attention as a kind: no softmax, no positions (ModuleFormer, section 2.2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxmoe.core.backends import Chooser
from jaxmoe.core.init import Init
from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.models.attention_base import AttentionBase, AttentionBaseLayer
from jaxmoe.ops.attention import AttentionParts, Sight, attend
from jaxmoe.ops.stick_breaking import BACKENDS, STICK_PARTS, StickPart


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
    return self.parts().attend(q_BLNH, k_BSKH, v_BSKH, sight)

  def parts(self) -> AttentionParts:
    """Returns the kind as parts of the keys; nearer ones take their share first."""
    return stick_parts(self.chooser)


def stick_parts(chooser: Chooser) -> AttentionParts:
  """Returns stick-breaking attention, whole and as parts of the keys."""

  def part(weights: Any, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> StickPart:
    del weights
    sight = dataclasses.replace(sight, scale=q.shape[-1] ** -0.5)
    return attend(chooser, ("stick_breaking", BACKENDS), q, k, v, sight)

  def whole(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> jax.Array:
    return part((), q, k, v, sight).out_BLNP.astype(q.dtype)

  def of_heads(first: jax.Array | int, number: int) -> AttentionParts:
    del first, number  # heads are alike
    return stick_parts(chooser)

  return AttentionParts(whole, part, (), lambda total: total.out_BLNP, STICK_PARTS, of_heads)
