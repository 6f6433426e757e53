"""Attention masks: which earlier tokens a token sees; records called on query and key tokens.

Padding sees nothing and is seen by nothing under every mask.
"""

from __future__ import annotations

import dataclasses

import jax

from jaxmoe.core.errors import InputError
from jaxmoe.core.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class DocumentMask:
  """A token sees itself and what comes before it in its document."""

  def __call__(self, query: Tokens, key: Tokens) -> jax.Array:
    """Returns (B, L, S) bool."""
    same = query.segment[:, :, None] == key.segment[:, None, :]
    return same & _before(query, key)


@dataclasses.dataclass(frozen=True)
class WindowMask:
  """A token sees itself and the `size - 1` tokens before it in its document (Mistral)."""

  size: int = 4096

  def __post_init__(self) -> None:
    if self.size < 1:
      raise InputError(f"size must be at least 1: size={self.size}")

  def __call__(self, query: Tokens, key: Tokens) -> jax.Array:
    """Returns (B, L, S) bool."""
    near = query.slot[:, :, None] - key.slot[:, None, :] < self.size
    return near & DocumentMask()(query, key)


@dataclasses.dataclass(frozen=True)
class CausalMask:
  """A token sees everything before it in its row, also across documents (GPT-2's packing)."""

  def __call__(self, query: Tokens, key: Tokens) -> jax.Array:
    """Returns (B, L, S) bool."""
    return _before(query, key)


MASKS = {
  "document": (DocumentMask, DocumentMask()),
  "window": (WindowMask, WindowMask(size=3)),
  "causal": (CausalMask, CausalMask()),
}


def _before(query: Tokens, key: Tokens) -> jax.Array:
  in_order = query.slot[:, :, None] >= key.slot[:, None, :]
  return in_order & query.valid[:, :, None] & key.valid[:, None, :]
