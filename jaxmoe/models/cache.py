"""The KV cache behind two methods, `append` and `attend`, and its `max_length`.

Training attends to the keys just made (`NoCache`); generation keeps them (`KVCache`). Attention
cannot tell them apart, and neither will it a paged cache.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.core.tokens import Tokens
from jaxmoe.ops.attention import AttentionParts


class Cache(Protocol):
  """What attention needs of a cache; a cache is a pytree."""

  def max_length(self, tokens: Tokens) -> int:
    """Returns how many tokens a row has room for."""

  def append(self, k_BLKH: jax.Array, v_BLKH: jax.Array, tokens: Tokens) -> Cache:
    """Returns the cache with these tokens in it; tokens that are not valid write nothing."""

  def attend(
    self, q_BLNH: jax.Array, tokens: Tokens, mask: Any, parts: AttentionParts
  ) -> jax.Array:
    """Returns (B, L, N, H), what each query finds among the keys its mask lets it see."""


@dataclasses.dataclass(frozen=True)
class NoCache:
  """No memory: queries see the keys of the same call, on all devices that have parts of the rows.

  Attributes:
    parallel: What happens where rows cross devices.
    keys: Keys, values and their tokens.
  """

  parallel: ParallelContext = ONE_DEVICE
  keys: Any = None

  def max_length(self, tokens: Tokens) -> int:
    """Returns the length of the rows."""
    return tokens.row_length

  def append(self, k_BLKH: jax.Array, v_BLKH: jax.Array, tokens: Tokens) -> NoCache:
    """Returns a cache of just these tokens."""
    return NoCache(self.parallel, (k_BLKH, v_BLKH))

  def attend(
    self, q_BLNH: jax.Array, tokens: Tokens, mask: Any, parts: AttentionParts
  ) -> jax.Array:
    """Returns (B, L, N, H)."""
    return self.parallel.attend(parts, (q_BLNH, *self.keys), tokens, mask)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["k_BKSH", "v_BKSH", "segment_BS"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class KVCache:
  """S slots a row; token of slot s lies at index s; an empty slot is padding.

  It is written in place where the caller donates it, and a head's keys lie together, as products
  with them want it: in another order each token would copy them.
  """

  k_BKSH: jax.Array
  v_BKSH: jax.Array
  segment_BS: jax.Array

  @classmethod
  def empty(
    cls,
    batch: int,
    slots: int,
    heads: tuple[int, int],
    dtype: Any,
    values: tuple[int, int] | None = None,
  ) -> KVCache:
    """Returns an empty cache; `heads` is (number of kv heads, head size), and `values` of values.

    `values` is None where they are of the size of keys.
    """
    k_BKSH, v_BKSH = (
      jnp.zeros((batch, number, slots, size), dtype) for number, size in (heads, values or heads)
    )
    return cls(k_BKSH, v_BKSH, jnp.zeros((batch, slots), jnp.int32))

  def max_length(self, tokens: Tokens) -> int:
    """Returns S."""
    del tokens
    return self.segment_BS.shape[1]

  def append(self, k_BLKH: jax.Array, v_BLKH: jax.Array, tokens: Tokens) -> KVCache:
    """Returns the cache with each valid token written at its slot."""
    rows_B1 = jnp.arange(k_BLKH.shape[0])[:, None]
    # An index past the end is dropped by the scatter.
    slot_BL = jnp.where(tokens.valid, tokens.slot, self.segment_BS.shape[1])
    # XLA turns a scatter of one token into a slice that is read, chosen and written, and copies the
    # cache for it. With one more token, of no slot, it stays a scatter, in place.
    more = int(slot_BL.size == 1)
    slot_BL = jnp.pad(slot_BL, [(0, 0), (0, more)], constant_values=self.segment_BS.shape[1])

    def write(memory_BKSH: jax.Array, values_BLKH: jax.Array) -> jax.Array:
      values_BLKH = values_BLKH.astype(memory_BKSH.dtype)
      values_BLKH = jnp.pad(values_BLKH, [(0, 0), (0, more), (0, 0), (0, 0)])
      return memory_BKSH.at[rows_B1, :, slot_BL].set(values_BLKH, mode="drop")

    segment_BL = jnp.pad(tokens.segment, [(0, 0), (0, more)])
    segment_BS = self.segment_BS.at[rows_B1, slot_BL].set(segment_BL, mode="drop")
    return KVCache(write(self.k_BKSH, k_BLKH), write(self.v_BKSH, v_BLKH), segment_BS)

  def attend(
    self, q_BLNH: jax.Array, tokens: Tokens, mask: Any, parts: AttentionParts
  ) -> jax.Array:
    """Returns (B, L, N, H)."""
    slot_S = jnp.arange(self.segment_BS.shape[1], dtype=jnp.int32)
    slot_BS = jnp.broadcast_to(slot_S, self.segment_BS.shape)
    # Who looks back asks for no more than slots and documents.
    seen = Tokens(slot_BS, slot_BS, self.segment_BS, slot_BS)
    k_BSKH, v_BSKH = (x.swapaxes(1, 2) for x in (self.k_BKSH, self.v_BKSH))
    return parts.attend(q_BLNH, k_BSKH, v_BSKH, mask(tokens, seen))
