"""Every device gets the keys and values of all: for any kind of attention, in any order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.tokens import Tokens
from jaxmoe.ops.attention import AttentionParts
from jaxmoe.parallel.attend.context_group import ContextGroup

Arrays = tuple[jax.Array, jax.Array, jax.Array]


def gather(
  parts: AttentionParts, arrays: Arrays, tokens: Tokens, mask: Any, group: ContextGroup
) -> jax.Array:
  """Returns what queries find among the keys of whole rows, which each device then has.

  Sends keys and values of every device to all others, and sums their gradients back; they are kept
  for the backward pass.
  """
  q_BLNH, k_BLKH, v_BLKP = arrays
  assert tokens.rows is not None
  k_BSKH, v_BSKP = (
    jax.lax.all_gather(x, group.axis, axis=1, tiled=True) for x in (k_BLKH, v_BLKP)
  )
  if not group.in_order:
    by_slot_BS11 = jnp.argsort(tokens.rows.slot_BS, axis=1)[:, :, None, None]
    k_BSKH, v_BSKP = (jnp.take_along_axis(x, by_slot_BS11, axis=1) for x in (k_BSKH, v_BSKP))
  return parts.attend(q_BLNH, k_BSKH, v_BSKP, mask(tokens, tokens.rows.whole))
