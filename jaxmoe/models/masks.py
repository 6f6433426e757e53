"""Attention masks: which earlier tokens a token sees; records called on query and key tokens.

Padding sees nothing and is seen by nothing under every mask. `reach` is how many slots before its
own a token can see at most; None where that is the whole row.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.core.tokens import Tokens
from jaxmoe.ops.attention import NO_SLOT, NOTHING, Sight


@dataclasses.dataclass(frozen=True)
class DocumentMask:
  """A token sees itself and what comes before it in its document."""

  reach: ClassVar[int | None] = None

  def __call__(self, query: Tokens, key: Tokens) -> Sight:
    """Returns what queries see of the keys of their rows, of which that of slot s has index s."""
    return _spans(query, key, _document_starts(query, key))


@dataclasses.dataclass(frozen=True)
class WindowMask:
  """A token sees itself and the `size - 1` tokens before it in its document (Mistral)."""

  size: int = 4096

  def __post_init__(self) -> None:
    if self.size < 1:
      raise InputError(f"size must be at least 1: size={self.size}")

  @property
  def reach(self) -> int:
    """How many slots before its own a token can see."""
    return self.size - 1

  def __call__(self, query: Tokens, key: Tokens) -> Sight:
    """Returns what queries see of the keys of their rows, of which that of slot s has index s."""
    near_BL = query.slot - self.reach
    return _spans(query, key, jnp.maximum(near_BL, _document_starts(query, key)))


@dataclasses.dataclass(frozen=True)
class CausalMask:
  """A token sees everything before it in its row, also across documents (GPT-2's packing)."""

  reach: ClassVar[int | None] = None

  def __call__(self, query: Tokens, key: Tokens) -> Sight:
    """Returns what queries see of the keys of their rows, in whatever order."""
    return _spans(query, key, jnp.zeros_like(query.slot))


MASKS = {
  "document": (DocumentMask, DocumentMask()),
  "window": (WindowMask, WindowMask(size=3)),
  "causal": (CausalMask, CausalMask()),
}


def _spans(query: Tokens, key: Tokens, first_BL: jax.Array) -> Sight:
  """Returns the sight of queries that see all from a slot up to their own."""
  first_BL = jnp.where(query.valid, first_BL, NOTHING[0])
  last_BL = jnp.where(query.valid, query.slot, NOTHING[1])
  return Sight(first_BL, last_BL, jnp.where(key.valid, key.slot, NO_SLOT))


def _document_starts(query: Tokens, key: Tokens) -> jax.Array:
  """Returns (B, L), the slot at which the document of each query starts.

  A document starts with each token whose number is not that of the token before it, padding aside.
  A query of another document than the key at its slot (which has found no room) sees nothing.
  """
  index_S = jnp.arange(key.slot.shape[1], dtype=jnp.int32)
  latest_BS = jax.lax.cummax(jnp.where(key.valid, index_S, -1), axis=1)
  before_BS = jnp.pad(latest_BS[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
  segment_BS = jnp.take_along_axis(key.segment, jnp.maximum(before_BS, 0), axis=1)
  starts_BS = (before_BS < 0) | (segment_BS != key.segment)
  start_BS = jax.lax.cummax(jnp.where(starts_BS & key.valid, key.slot, 0), axis=1)
  at_BL = jnp.clip(query.slot, 0, index_S[-1])
  same_BL = jnp.take_along_axis(key.segment, at_BL, axis=1) == query.segment
  return jnp.where(same_BL, jnp.take_along_axis(start_BS, at_BL, axis=1), NOTHING[0])
