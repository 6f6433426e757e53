"""The devices that have parts of the same rows: permutes around them, and what each sees."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.core.tokens import Tokens
from jaxmoe.ops.attention import NO_SLOT, Sight


class ContextGroup(NamedTuple):
  """A context group.

  Attributes:
    axis: Of the mesh.
    size: How many devices it has.
    in_order: Whether each device has one stretch of a row, in order of time.
    permutes: Whether what is sent to one device is a permute. In a stage of a pipeline it is
      gathered by all instead: stages pass different branches, in which XLA's permutes on CPU give
      wrong numbers without a word, while gathers are exact.
  """

  axis: str
  size: int
  in_order: bool
  permutes: bool = True

  def hops(self, mask: Any, length: int) -> int:
    """Returns how many devices before its own have keys that a query of `length` a device sees."""
    if mask.reach is None or not self.in_order:
      return self.size - 1
    return min(self.size - 1, -(-mask.reach // length))

  def shift(self, tree: Any, by: int) -> Any:
    """Returns what the device that is `by` places before this one has, around the ring."""
    if by % self.size == 0:
      return tree
    if not self.permutes:
      source = (self.rank() - by) % self.size
      return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, self.axis)[source], tree)
    pairs = [(at, (at + by) % self.size) for at in range(self.size)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis, pairs), tree)

  def rank(self) -> jax.Array:
    """Returns which device this is."""
    return jax.lax.axis_index(self.axis)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSpans:
  """What every query of whole rows sees, in order of devices; known to each device.

  Attributes:
    first_BS: The first slot that a query sees.
    last_BS: The last one.
    slot_BS: The slot of each key; `NO_SLOT` for padding.
  """

  first_BS: jax.Array
  last_BS: jax.Array
  slot_BS: jax.Array

  @classmethod
  def of(cls, tokens: Tokens, mask: Any) -> RowSpans:
    """Returns the spans of all tokens of the rows."""
    assert tokens.rows is not None, "these rows are whole"
    every = tokens.rows.part(0, tokens.row_length)
    sight = mask(every, tokens.rows.whole)
    return cls(sight.first_BL, sight.last_BL, jnp.where(every.valid, every.slot, NO_SLOT))

  def sight(self, queries: jax.Array, keys: jax.Array, size: int) -> Sight:
    """Returns what queries of one device see of keys of another, of `size` devices."""
    length = self.slot_BS.shape[1] // size

    def cut(x_BS: jax.Array, device: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(x_BS, device % size * length, length, axis=1)

    return Sight(cut(self.first_BS, queries), cut(self.last_BS, queries), cut(self.slot_BS, keys))
