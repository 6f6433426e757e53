"""A trip around a context group: what is known before anything is traced, and sums of steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.core.tokens import Tokens
from jaxmoe.ops.attention import AttentionParts
from jaxmoe.ops.attention.parts import PartAlgebra
from jaxmoe.parallel.attend.context_group import ContextGroup, RowSpans

Arrays = tuple[jax.Array, jax.Array, jax.Array]
"""Queries, keys and values of a device's tokens."""


class Trip(NamedTuple):
  """A trip of keys, or of queries, around a context group.

  Attributes:
    part: That of `AttentionParts`.
    algebra: How parts merge.
    group: The devices.
    hops: How many devices before its own have keys that a query sees.
  """

  part: Any
  algebra: PartAlgebra
  group: ContextGroup
  hops: int

  @classmethod
  def of(
    cls, parts: AttentionParts, q_BLNH: jax.Array, mask: Any, group: ContextGroup
  ) -> Trip:
    """Returns the trip of a kind of attention under a mask."""
    return cls(parts.part, parts.algebra, group, group.hops(mask, q_BLNH.shape[1]))

  def find(self, spans: RowSpans, queries: int, keys: int) -> Any:
    """Returns (weights, q, k, v) -> part, of queries and keys so many places before this device."""
    rank = self.group.rank()
    sight = spans.sight(rank - queries, rank - keys, self.group.size)
    return lambda weights, q, k, v: self.part(weights, q, k, v, sight)

  def shift_part(self, part: Any, by: int, dtype: Any) -> Any:
    """Returns another device's part, see `ContextGroup.shift`; what it found goes in `dtype`."""
    sent = part._replace(out_BLNP=part.out_BLNP.astype(dtype))
    came = self.group.shift(sent, by)
    return came._replace(out_BLNP=came.out_BLNP.astype(jnp.float32))

  def merge(self, near: Any, far: Any) -> Any:
    """Returns the part of two, of which `far` may be none yet."""
    return near if far is None else self.algebra.merge(near, far)


def run(trip: Any, parts: AttentionParts, arrays: Arrays, tokens: Tokens, mask: Any) -> jax.Array:
  """Returns what `trip(weights, q, k, v, spans)` finds, finalized, in the dtype of queries."""
  total = trip(parts.weights, *arrays, RowSpans.of(tokens, mask))
  return parts.finalize(total).astype(arrays[0].dtype)


def zeros(tree: Any) -> Any:
  """Returns float32 zeros of the shapes of a tree, for sums of gradients."""
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)


def add(sums: Any, more: Any) -> Any:
  """Returns the sums with gradients added."""
  return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, more)


def like(sums: Any, arrays: Any) -> Any:
  """Returns the sums in the dtypes of what they are gradients of."""
  return jax.tree.map(lambda a, b: a.astype(b.dtype), sums, arrays)
