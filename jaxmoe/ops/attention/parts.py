"""A kind of attention as parts of the keys: what finds one, how they merge, how gradients part.

Devices that have parts of a row (`jaxmoe/parallel/attend`) know a kind by this record alone. With
o the total of parts 0 (the nearest keys) to n, the gradient that reaches part j is a function of
the part, of what was kept of the forward pass for it and, where parts have an order, of the parts
farther than j merged: so each part can be made again, one at a time, and none is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.ops.attention.merge import AttentionPart, merge
from jaxmoe.ops.attention.sight import Sight


@dataclasses.dataclass(frozen=True)
class PartAlgebra:
  """How parts of one kind are put together, and taken apart again for gradients.

  Attributes:
    merge: Returns the part of two, of which the first has the nearer keys.
    kept: Returns what of each part, nearest first, and of their total the backward pass needs: a
      (B, L, N) array each, or the total itself.
    ready: Returns (B, L, N) arrays of what was kept for a part and the total's gradient.
    pull: Returns the gradient of a part, of the part, the gradient of the total's `out_BLNP`, what
      `ready` returned, and the farther parts merged (None for none).
    ordered: Whether it matters which keys are nearer.
  """

  merge: Callable[[Any, Any], Any]
  kept: Callable[[Sequence[Any], Any], list[Any]]
  ready: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
  pull: Callable[[Any, jax.Array, tuple[jax.Array, jax.Array], Any], Any]
  ordered: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionParts:
  """A kind of attention, as what spreads rows over devices asks for it.

  Attributes:
    attend: (q_BLNH, k_BSKH, v_BSKP, sight) -> (B, L, N, P) in q's dtype, of all keys at once.
    part: (weights, q, k, v, sight) -> a part, without sinks; closes over no array.
    weights: What `part` reads of the layer, a tree of arrays.
    finalize: What is found, of the total of all parts: sinks join here, once.
    algebra: How parts merge.
    of_heads: Returns the kind of some query heads, of the first one and their number; None where
      heads cannot be taken apart.
  """

  attend: Callable[[jax.Array, jax.Array, jax.Array, Sight], jax.Array]
  part: Callable[[Any, jax.Array, jax.Array, jax.Array, Sight], Any]
  weights: Any
  finalize: Callable[[Any], jax.Array]
  algebra: PartAlgebra
  of_heads: Callable[[jax.Array | int, int], AttentionParts] | None = None


def _kept(parts: Sequence[AttentionPart], total: AttentionPart) -> list[AttentionPart]:
  return [total] * len(parts)


def _ready(total: AttentionPart, dtotal: AttentionPart) -> tuple[jax.Array, jax.Array]:
  """Returns the log-sum-exp of all keys, and dout . out - dlse."""
  delta_BLN = jnp.sum(dtotal.out_BLNP * total.out_BLNP, axis=-1) - dtotal.lse_BLN
  return total.lse_BLN, delta_BLN


def _pull(
  part: AttentionPart, dout_BLNP: jax.Array, ready: tuple[jax.Array, jax.Array], far: None
) -> AttentionPart:
  """Returns the gradient of a part: with w = e^(lse_j - lse), w dout and w (dout . o_j - delta)."""
  del far
  lse_BLN, delta_BLN = ready
  some = jnp.isfinite(part.lse_BLN) & jnp.isfinite(lse_BLN)
  weight_BLN = jnp.where(some, jnp.exp(jnp.where(some, part.lse_BLN - lse_BLN, 0.0)), 0.0)
  found_BLN = jnp.sum(dout_BLNP * part.out_BLNP, axis=-1)
  return AttentionPart(weight_BLN[..., None] * dout_BLNP, weight_BLN * (found_BLN - delta_BLN))


SOFTMAX_PARTS = PartAlgebra(merge, _kept, _ready, _pull)
