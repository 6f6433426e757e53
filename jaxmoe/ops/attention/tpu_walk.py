"""The walk of TPU kernels of attention over blocks of queries and keys, whatever they find there.

Scores stand with keys along sublanes and queries along lanes, so that what is kept of each query
is a row: sums over keys need no exchange of lanes. A block of queries visits the range of blocks of
keys from the first to the last that a query of it sees; in a grid as long as the longest walk,
steps past its end stay at the last block, which is not fetched again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxmoe.core.backends import Fits, Need, limited
from jaxmoe.ops.attention.seen_blocks import cut_spans, seen_blocks
from jaxmoe.ops.attention.sight import Sight
from jaxmoe.ops.tpu_kernel import Interpret

Index = Callable[..., tuple[Any, ...]]
_MOST_HEAD = 256


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How long blocks are, and where kernels run.

  Attributes:
    queries: Of a block; a multiple of 128 on a chip.
    keys: Likewise.
    interpret: Whether an interpreter runs kernels, see `tpu_kernel`.
  """

  queries: int = 256
  keys: int = 256
  interpret: Interpret = False


def fits_tpu(features: Iterable[str]) -> Fits:
  """Returns what fits TPUs, these features, and heads that are not too large for blocks."""
  known = limited(("tpu",), features)

  def fits(need: Need) -> str | None:
    largest = max(need.sizes["H"], need.sizes["P"])
    large = f"has heads of at most {_MOST_HEAD}, not {largest}" if largest > _MOST_HEAD else None
    return known(need) or large

  return fits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walk:
  """What each block of queries sees, and each block of keys is seen by, in each row of the batch.

  Attributes:
    first_B1L: First slots that queries see, rounded up to whole blocks.
    last_B1L: Last slots.
    slot_BS1: Slots of keys.
    keys_of: First and last block of keys of each block of queries, (B, i) each; 0 and -1 for none.
    queries_of: Likewise of each block of keys.
  """

  first_B1L: jax.Array
  last_B1L: jax.Array
  slot_BS1: jax.Array
  keys_of: tuple[jax.Array, jax.Array]
  queries_of: tuple[jax.Array, jax.Array]

  @classmethod
  def of(cls, sight: Sight, tiles: Tiles) -> Walk:
    """Returns that of a sight by spans."""
    first_Bil, last_Bil, slot_Bjs = cut_spans(sight.spans, tiles.queries, tiles.keys)
    seen_Bij = seen_blocks(first_Bil, last_Bil, slot_Bjs)
    batch = seen_Bij.shape[0]
    first_B1L, last_B1L = (x.reshape(batch, 1, -1) for x in (first_Bil, last_Bil))
    ranges = _range(seen_Bij), _range(seen_Bij.swapaxes(1, 2))
    return cls(first_B1L, last_B1L, slot_Bjs.reshape(batch, -1, 1), *ranges)

  @property
  def masks(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `mask` of a block is made of."""
    return self.first_B1L, self.last_B1L, self.slot_BS1


def _range(seen_Bij: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the first and the last j of each i that are seen."""
  number_j = jnp.arange(seen_Bij.shape[2], dtype=jnp.int32)
  last_Bi = jnp.max(jnp.where(seen_Bij, number_j, -1), axis=2)
  first_Bi = jnp.min(jnp.where(seen_Bij, number_j, seen_Bij.shape[2]), axis=2)
  return jnp.where(last_Bi < 0, 0, first_Bi), last_Bi


def mask(first_ref: Any, last_ref: Any, slot_ref: Any) -> jax.Array:
  """Returns (s, l) bool, which query of a block sees which key, of refs (1, l), (1, l), (s, 1)."""
  slot_s1 = slot_ref[...]
  return (first_ref[...] <= slot_s1) & (slot_s1 <= last_ref[...])


class Steps(NamedTuple):
  """Where the steps of a grid stand, by its indices and what was counted before.

  Attributes:
    tiles: How long blocks are.
    query: Returns (row of the batch, query head, block of queries).
    key: Returns (row of the batch, key head, block of keys).
  """

  tiles: Tiles
  query: Index
  key: Index

  @classmethod
  def over_keys(cls, tiles: Tiles, group: int, visit: Callable[..., Any]) -> Steps:
    """Returns those of the grid (b, n, i, t); `visit(t, low, high)` is the block of keys at t."""

    def key(b: Any, n: Any, i: Any, t: Any, low: Any, high: Any) -> tuple[Any, ...]:
      return b, jax.lax.div(n, group), visit(t, low[b, i], high[b, i])

    return cls(tiles, lambda b, n, i, t, *_: (b, n, i), key)

  @classmethod
  def over_queries(cls, tiles: Tiles, group: int, blocks: int) -> Steps:
    """Returns those of the grid (b, k, j, t): so many blocks of queries of each head of a group."""

    def query(b: Any, k: Any, j: Any, t: Any, low: Any, high: Any) -> tuple[Any, ...]:
      head = k * group + jax.lax.div(t, blocks)
      return b, head, upward(jax.lax.rem(t, blocks), low[b, j], high[b, j])

    return cls(tiles, query, lambda b, k, j, t, *_: (b, k, j))

  def spans(self) -> list[pl.BlockSpec]:
    """Returns the blocks of `Walk.masks`."""
    query = pl.BlockSpec((None, 1, self.tiles.queries), lambda *at: _less(self.query(*at)))
    key = pl.BlockSpec((None, self.tiles.keys, 1), lambda *at: (*self.key(*at)[::2], 0))
    return [query, query, key]

  def query_rows(self, size: int) -> pl.BlockSpec:
    """Returns blocks of (B, N, L, size)."""
    return pl.BlockSpec((None, None, self.tiles.queries, size), lambda *at: (*self.query(*at), 0))

  def key_rows(self, size: int) -> pl.BlockSpec:
    """Returns blocks of (B, K, S, size)."""
    return pl.BlockSpec((None, None, self.tiles.keys, size), lambda *at: (*self.key(*at), 0))

  def query_numbers(self) -> pl.BlockSpec:
    """Returns blocks of (B, N, 1, L)."""

    def at_query(*at: Any) -> tuple[Any, ...]:
      b, n, i = self.query(*at)
      return b, n, 0, i

    return pl.BlockSpec((None, None, 1, self.tiles.queries), at_query)

  def pair_numbers(self) -> pl.BlockSpec:
    """Returns blocks of (B, N, j, 1, L): numbers of queries at each block of keys."""

    def at_pair(*at: Any) -> tuple[Any, ...]:
      b, n, i = self.query(*at)
      return b, n, self.key(*at)[2], 0, i

    return pl.BlockSpec((None, None, None, 1, self.tiles.queries), at_pair)


def _less(query: tuple[Any, ...]) -> tuple[Any, ...]:
  b, _, i = query
  return b, 0, i


def upward(t: Any, low: Any, high: Any) -> Any:
  """Returns the block at step t of a walk from the lowest to the highest."""
  return jnp.maximum(jnp.minimum(low + t, high), 0)


def downward(t: Any, low: Any, high: Any) -> Any:
  """Returns the block at step t of a walk from the highest to the lowest."""
  return jnp.maximum(high - t, low)


def heads_first(x_BLNH: jax.Array, block: int) -> jax.Array:
  """Returns (B, N, L, H) with L rounded up to whole blocks by zeros."""
  x_BNLH = x_BLNH.swapaxes(1, 2)
  return jnp.pad(x_BNLH, [(0, 0), (0, 0), (0, -x_BNLH.shape[2] % block), (0, 0)])


def heads_last(x_BNLH: jax.Array, length: int) -> jax.Array:
  """Undoes `heads_first`."""
  return x_BNLH[:, :, :length].swapaxes(1, 2)
