"""Which slots' rows lie in which block of rows: the map that kernels walk by, made of sizes alone.

Slots visit the blocks that their rows lie in, in the order of rows, so that the visits to a block
follow one another, as do those of a slot. A slot without rows visits once, for its gradient's sake.
Products over the same rows have the same map, which XLA makes once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
  """The visits of slots to blocks of rows; there are as many as there can be.

  Attributes:
    slot_V: Who visits; S past the last slot, whose visits are to blocks without rows of any.
    block_V: Which block.
    read_V: The same, but the last block with rows instead of one past it, which nobody reads.
    weight_V: The last slot with rows so far, whose matrix is there.
    bound_I: The first row of each slot, and twice the first of none.
  """

  slot_V: jax.Array
  block_V: jax.Array
  read_V: jax.Array
  weight_V: jax.Array
  bound_I: jax.Array

  @classmethod
  def of(cls, sizes_S: jax.Array, num_rows: int, block_rows: int) -> Visits:
    """Returns those to blocks of so many rows."""
    num_blocks, end_S = -(-num_rows // block_rows), jnp.cumsum(sizes_S, dtype=jnp.int32)
    start_S, total_1 = end_S - sizes_S, end_S[-1:]
    first_S = start_S // block_rows
    count_S = jnp.maximum(end_S - 1, start_S) // block_rows - first_S + 1
    until_S = jnp.cumsum(count_S, dtype=jnp.int32)
    visit_V = jnp.arange(num_blocks + sizes_S.shape[0], dtype=jnp.int32)
    slot_V = jnp.sum(visit_V[:, None] >= until_S[None], axis=1, dtype=jnp.int32)
    before_I = jnp.concatenate([until_S - count_S, until_S[-1:]])
    first_I = jnp.concatenate([first_S, -(-total_1 // block_rows)])
    block_V = jnp.minimum(first_I[slot_V] + visit_V - before_I[slot_V], num_blocks - 1)
    some_I = jnp.concatenate([sizes_S > 0, jnp.zeros(1, bool)])
    weight_V = jax.lax.cummax(jnp.where(some_I[slot_V], slot_V, 0))
    read_V = jnp.minimum(block_V, jnp.maximum(total_1 - 1, 0) // block_rows)
    return cls(slot_V, block_V, read_V, weight_V, jnp.concatenate([start_S, total_1, total_1]))

  @property
  def scalars(self) -> list[jax.Array]:
    """What `SlotVisit` and index maps read."""
    return [self.slot_V, self.block_V, self.read_V, self.weight_V, self.bound_I]


@dataclasses.dataclass(frozen=True)
class SlotVisit:
  """The visit that a kernel is at.

  Attributes:
    slot: Refs of `Visits`.
    block: Likewise.
    bound: Likewise.
    at: Its number.
    rows: Of a block.
  """

  slot: Any
  block: Any
  bound: Any
  at: Any
  rows: int

  @property
  def range(self) -> tuple[Any, Any]:
    """Where the slot's rows begin and end, counted from the block's first."""
    start, slot = self.block[self.at] * self.rows, self.slot[self.at]
    return self.bound[slot] - start, self.bound[slot + 1] - start

  @property
  def whole(self) -> Any:
    """Whether all rows of the block are the slot's."""
    low, high = self.range
    return (low <= 0) & (high >= self.rows)

  @property
  def partial(self) -> Any:
    """Whether some of them are."""
    low, high = self.range
    return (low < high) & ~self.whole

  @property
  def mask_r1(self) -> jax.Array:
    """Which of them are."""
    low, high = self.range
    row_r1 = jax.lax.broadcasted_iota(jnp.int32, (self.rows, 1), 0)
    return (low <= row_r1) & (row_r1 < high)

  def first_of(self, ref: Any) -> Any:
    """Whether it is the first visit to its block, or of its slot."""
    return (self.at == 0) | (ref[self.at] != ref[jnp.maximum(self.at - 1, 0)])

  def last_of(self, ref: Any) -> Any:
    """Whether it is the last, of a slot; visits past the last slot have none."""
    return ref[self.at] != ref[jnp.minimum(self.at + 1, ref.shape[0] - 1)]
