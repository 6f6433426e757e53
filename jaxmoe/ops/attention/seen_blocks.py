"""Which blocks of keys a block of queries sees, from spans: what attention in blocks visits."""

import jax
import jax.numpy as jnp

from jaxmoe.ops.attention.sight import NO_SLOT, NOTHING


def cut_spans(
  spans: tuple[jax.Array, jax.Array, jax.Array], rows: int, keys: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns first and last slots as (B, i, rows), slots of keys as (B, j, keys).

  Blocks are filled with queries that see nothing and keys that nobody sees.
  """
  first_BL, last_BL, slot_BS = spans
  return (
    _cut(first_BL, rows, NOTHING[0]), _cut(last_BL, rows, NOTHING[1]),
    _cut(slot_BS, keys, NO_SLOT),
  )  # fmt: skip


def seen_blocks(first_Bil: jax.Array, last_Bil: jax.Array, slot_Bjs: jax.Array) -> jax.Array:
  """Returns (B, i, j) bool, whether some query of block i sees some key of block j.

  Exact where the slots of a block's keys are all those between its lowest and its highest.
  """
  low_Bj = jnp.min(jnp.where(slot_Bjs == NO_SLOT, NOTHING[0], slot_Bjs), axis=-1)
  high_Bj = jnp.max(slot_Bjs, axis=-1)
  reach_Bilj = (first_Bil[..., None] <= high_Bj[:, None, None]) & (
    last_Bil[..., None] >= low_Bj[:, None, None]
  )
  return jnp.any(reach_Bilj, axis=2)


def visits(seen_Bij: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns for each block of queries the blocks to visit, in order, and how many they are.

  Entries of (B, i, j) int32 after the (B, i) that count are j, no block.
  """
  number_j = jnp.arange(seen_Bij.shape[-1], dtype=jnp.int32)
  order_Bij = jnp.sort(jnp.where(seen_Bij, number_j, seen_Bij.shape[-1]), axis=-1)
  return order_Bij, jnp.sum(seen_Bij, axis=-1, dtype=jnp.int32)


def _cut(x_BL: jax.Array, size: int, fill: int) -> jax.Array:
  batch, length = x_BL.shape
  padded = jnp.pad(x_BL, [(0, 0), (0, -length % size)], constant_values=fill)
  return padded.reshape(batch, -1, size)
