"""Heads for tokens: each device has all tokens of some heads (DeepSpeed-Ulysses, arXiv:2309.14509).

An all-to-all before attention gives a device whole rows of N / n query heads and of the key heads
these read, another gives it back its own tokens of all heads; in between attention is that of one
device. Fewer key heads than devices are sent to each device that reads them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.tokens import Tokens
from jaxmoe.ops.attention import AttentionParts
from jaxmoe.parallel.attend.context_group import ContextGroup
from jaxmoe.parallel.attend.trip import Arrays

HEADS, LENGTH = 2, 1  # dims of (B, L, N, H)


def ulysses(
  parts: AttentionParts, arrays: Arrays, tokens: Tokens, mask: Any, group: ContextGroup
) -> jax.Array:
  """Returns what queries find among the keys of whole rows, head by head.

  Sends (n - 1) / n of queries, keys, values and of what is found. n divides the query heads, and
  divides the key heads or is a multiple of them.
  """
  q_BLNH, k_BLKH, v_BLKP = arrays
  assert tokens.rows is not None and parts.of_heads is not None
  again = max(1, group.size // k_BLKH.shape[HEADS])
  k_BLKH, v_BLKP = (jnp.repeat(x, again, axis=HEADS) for x in (k_BLKH, v_BLKP))
  q_BSnH, k_BSkH, v_BSkP = (
    jax.lax.all_to_all(x, group.axis, HEADS, LENGTH, tiled=True) for x in (q_BLNH, k_BLKH, v_BLKP)
  )
  rows = tokens.rows
  if not group.in_order:
    by_slot_BS11 = jnp.argsort(rows.slot_BS, axis=1)[:, :, None, None]
    q_BSnH, k_BSkH, v_BSkP = (
      jnp.take_along_axis(x, by_slot_BS11, axis=LENGTH) for x in (q_BSnH, k_BSkH, v_BSkP)
    )
  heads = q_BSnH.shape[HEADS]
  here = parts.of_heads(group.rank() * heads, heads)
  out_BSnP = here.attend(q_BSnH, k_BSkH, v_BSkP, mask(rows.whole, rows.whole))
  if not group.in_order:
    out_BSnP = jnp.take_along_axis(out_BSnP, rows.slot_BS[:, :, None, None], axis=LENGTH)
  return jax.lax.all_to_all(out_BSnP, group.axis, LENGTH, HEADS, tiled=True)
