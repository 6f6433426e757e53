"""The place of each choice of a token in its slot's rows, found without sorting.

Each slot owns `capacity` rows that are computed in one batched product. Choices past them overflow
into blocks of rows of one slot each. A choice's place is the number of earlier choices of its slot,
in token order, all choices of a token together, so no token's row depends on a later token.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

_COUNT_STEPS = 64


class Places(NamedTuple):
  """The two maps between choices and rows, and the blocks that overflow into rows of their own.

  Rows 0 .. S * capacity - 1 are the slots' own, the rest of the R rows hold the overflow blocks.
  Row R and choice T * A do not exist: `row_TA` is R where the slot is S, `choice_R` is T * A where
  nothing fills the row.
  """

  row_TA: jax.Array
  choice_R: jax.Array
  num_blocks: jax.Array
  block_slot_K: jax.Array


def row_capacity(num_choices: int, num_slots: int) -> int:
  """Returns mean + sqrt(mean) choices a slot, rounded up: few overflow when balanced.

  Up to 8 it is 8, as where a few rows are written, and else a multiple of 16.
  """
  mean = num_choices / num_slots
  least = mean + math.sqrt(mean)
  return 8 if least <= 8 else math.ceil(least / 16) * 16


def block_rows(capacity: int) -> int:
  """Returns the rows of an overflow block.

  At most the capacity: a slot with b blocks then has more than b * rows choices, so all overflow
  blocks together have fewer rows than there are choices. Slots without rows of their own have
  blocks of 64, one of which is half empty in the mean.
  """
  return min(128, capacity) or 64


@jax.named_scope("plan")
def place_choices(slot_TA: jax.Array, num_slots: int, capacity: int) -> Places:
  """Returns the place of every choice; nothing is dropped."""
  num_choices = slot_TA.size
  earlier_TS, sizes_S = _count_earlier(slot_TA, num_slots)
  in_use_TA = slot_TA < num_slots
  safe_TA = jnp.where(in_use_TA, slot_TA, 0)
  place_TA = jnp.take_along_axis(earlier_TS, safe_TA, axis=1, mode="clip") + _twins(slot_TA)

  rows = block_rows(capacity)
  overflow_S = jnp.maximum(sizes_S - capacity, 0)
  blocks_S = -(-overflow_S // rows)
  ends_S = jnp.cumsum(blocks_S)
  # One block even where none can overflow: the loop over them must still have something to index.
  most_blocks = max(1, num_choices // rows) + (0 if capacity else num_slots)
  block_K = jnp.arange(most_blocks, dtype=jnp.int32)
  block_slot_K = jnp.sum(block_K[:, None] >= ends_S[None, :], axis=1, dtype=jnp.int32)
  first_row_S = num_slots * capacity + rows * (ends_S - blocks_S)
  num_rows = num_slots * capacity + rows * block_K.shape[0]
  overflow_row_TA = first_row_S.at[safe_TA].get(mode="clip") + place_TA - capacity
  row_TA = jnp.where(place_TA < capacity, safe_TA * capacity + place_TA, overflow_row_TA)
  row_TA = jnp.where(in_use_TA, row_TA, num_rows)

  choice_C = jnp.arange(num_choices, dtype=jnp.int32)
  choice_R = jnp.full((num_rows,), num_choices, jnp.int32)
  choice_R = choice_R.at[row_TA.reshape(-1)].set(choice_C, mode="drop")
  return Places(
    row_TA=row_TA, choice_R=choice_R, num_blocks=ends_S[-1], block_slot_K=block_slot_K
  )


@jax.named_scope("plan")
def place_rows(slot_TA: jax.Array, num_slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the places of choices in rows in order of slot, then of token, without gaps.

  Returns:
    row_TA, T * A where the slot is S; choice_R, the inverse, T * A for a row that nothing fills;
    sizes_S, the rows of each slot. R = T * A.
  """
  num_choices = slot_TA.size
  in_use_TA = slot_TA < num_slots
  safe_TA = jnp.where(in_use_TA, slot_TA, 0)
  earlier_TS, sizes_S = _count_earlier(slot_TA, num_slots)
  place_TA = jnp.take_along_axis(earlier_TS, safe_TA, axis=1, mode="clip") + _twins(slot_TA)
  first_S = jnp.cumsum(sizes_S) - sizes_S
  row_TA = jnp.where(in_use_TA, first_S.at[safe_TA].get(mode="clip") + place_TA, num_choices)
  choice_C = jnp.arange(num_choices, dtype=jnp.int32)
  empty_R = jnp.full((num_choices,), num_choices, jnp.int32)
  return row_TA, empty_R.at[row_TA.reshape(-1)].set(choice_C, mode="drop"), sizes_S


def _twins(slot_TA: jax.Array) -> jax.Array:
  """Returns how many earlier choices of the same token name the same slot; rarely any."""
  num_active = slot_TA.shape[1]
  same_TAA = slot_TA[:, :, None] == slot_TA[:, None, :]
  before_AA = jnp.arange(num_active)[:, None] > jnp.arange(num_active)[None, :]
  return jnp.sum(same_TAA & before_AA[None], axis=-1, dtype=jnp.int32)


def _count_earlier(slot_TA: jax.Array, num_slots: int) -> tuple[jax.Array, jax.Array]:
  """Returns how often earlier tokens chose each slot (T, S), and how often all did (S,).

  The naive form is cumsum(onehot) - onehot. Here 64 steps of a scan run over as many stretches of
  tokens at once as there are, which is 3 times as fast on CPU and short on other devices.
  """
  num_tokens, num_active = slot_TA.shape
  stretches = -(-num_tokens // _COUNT_STEPS)
  padding = ((0, stretches * _COUNT_STEPS - num_tokens), (0, 0))
  slot_TA = jnp.pad(slot_TA, padding, constant_values=num_slots)
  slot_LNA = slot_TA.reshape(stretches, _COUNT_STEPS, num_active).transpose(1, 0, 2)
  slot_S = jnp.arange(num_slots, dtype=slot_TA.dtype)

  def count(seen_NS: jax.Array, slot_NA: jax.Array) -> tuple[jax.Array, jax.Array]:
    chosen_NAS = slot_NA[:, :, None] == slot_S[None, None, :]
    return seen_NS + jnp.sum(chosen_NAS, axis=1, dtype=jnp.int32), seen_NS

  zeros_NS = jnp.zeros((stretches, num_slots), jnp.int32)
  total_NS, within_LNS = jax.lax.scan(count, zeros_NS, slot_LNA)
  before_NS = jnp.cumsum(total_NS, axis=0) - total_NS
  earlier_NLS = within_LNS.transpose(1, 0, 2) + before_NS[:, None, :]
  return earlier_NLS.reshape(-1, num_slots)[:num_tokens], jnp.sum(total_NS, axis=0)
