"""The KV cache behind two methods, `append` and `attend`, and its `max_length`.

Training attends to the keys just made (`NoCache`); generation keeps them (`KVCache`). Attention
cannot tell them apart, and neither will it a paged cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxmoe.core.tokens import Tokens

Attend = Callable[..., jax.Array]
"""What a layer does with what was kept: (q_BLNH, k_BSKH, v_BSKH, sight) -> out_BLNH."""


class Cache(Protocol):
  """What attention needs of a cache; a cache is a pytree."""

  def max_length(self, tokens: Tokens) -> int:
    """Returns how many tokens a row has room for."""

  def append(self, k_BLKH: jax.Array, v_BLKH: jax.Array, tokens: Tokens) -> Cache:
    """Returns the cache with these tokens in it; tokens that are not valid write nothing."""

  def attend(self, q_BLNH: jax.Array, tokens: Tokens, mask: Any, attend: Attend) -> jax.Array:
    """Returns (B, L, N, H), what each query finds among the keys its mask lets it see."""


@dataclasses.dataclass(frozen=True)
class NoCache:
  """No memory: queries see the keys of the same call."""

  keys: Any = None

  def max_length(self, tokens: Tokens) -> int:
    """Returns the length of the rows."""
    return tokens.slot.shape[1]

  def append(self, k_BLKH: jax.Array, v_BLKH: jax.Array, tokens: Tokens) -> NoCache:
    """Returns a cache of just these tokens."""
    return NoCache((k_BLKH, v_BLKH, tokens))

  def attend(self, q_BLNH: jax.Array, tokens: Tokens, mask: Any, attend: Attend) -> jax.Array:
    """Returns (B, L, N, H)."""
    k_BSKH, v_BSKH, seen = self.keys
    return attend(q_BLNH, k_BSKH, v_BSKH, mask(tokens, seen))


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["k_BSKH", "v_BSKH", "tokens"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class KVCache:
  """S slots a row; token of slot s lies at index s; an empty slot is padding."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array
  tokens: Tokens

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
    k_BSKH = jnp.zeros((batch, slots, *heads), dtype)
    v_BSKH = k_BSKH if values is None else jnp.zeros((batch, slots, *values), dtype)
    none = jnp.zeros((batch, slots), jnp.int32)
    return cls(k_BSKH, v_BSKH, Tokens(none, none, none, none))

  def max_length(self, tokens: Tokens) -> int:
    """Returns S."""
    del tokens
    return self.k_BSKH.shape[1]

  def append(self, k_BLKH: jax.Array, v_BLKH: jax.Array, tokens: Tokens) -> KVCache:
    """Returns the cache with each valid token written at its slot."""
    rows_B1 = jnp.arange(k_BLKH.shape[0])[:, None]
    # An index past the end is dropped by the scatter.
    slot_BL = jnp.where(tokens.valid, tokens.slot, self.k_BSKH.shape[1])

    def write(memory: jax.Array, values: jax.Array) -> jax.Array:
      return memory.at[rows_B1, slot_BL].set(values.astype(memory.dtype), mode="drop")

    # What is asked of routers is no business of those who look back.
    plain = dataclasses.replace(
      tokens, replayed_experts=None, per_sequence=False, return_routing=False
    )
    return KVCache(
      write(self.k_BSKH, k_BLKH),
      write(self.v_BSKH, v_BLKH),
      jax.tree.map(write, self.tokens, plain),
    )

  def attend(self, q_BLNH: jax.Array, tokens: Tokens, mask: Any, attend: Attend) -> jax.Array:
    """Returns (B, L, N, H)."""
    return attend(q_BLNH, self.k_BSKH, self.v_BSKH, mask(tokens, self.tokens))
