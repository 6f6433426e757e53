"""Tokens of a packed batch: id, position, segment and what is asked of their routers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Compare:
  """What gates that are trees tell of the tokens of each domain, see `ops/soft_tree.py`."""

  num_domains: int
  target: Literal["parity", "load"]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["id", "position", "segment", "slot", "replayed_experts", "domain", "values"],
  meta_fields=["per_sequence", "return_routing", "compare"],
)
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Per-token records, int32, of shape (B, L) unless stated otherwise.

  Attributes:
    id: The token's id in the vocabulary.
    position: Its place in its document, from 0; what rotary embeddings turn by.
    segment: Which document of the row it belongs to, from 1; 0 is padding.
    slot: Its place in the row (and in a cache), which orders it in time.
    replayed_experts: Choices to take in place of the routers' own, (layers, B, L, A) by depth, or
      (B, L, A) inside a layer; -1 is no choice. None to let routers choose.
    domain: Which part of the data it is from, from 0; None where nobody asks.
    values: What weights ask of each token, of any dtype, (B, L, ...) by name; see
      core/weight_formats.py.
    per_sequence: Whether routers also count choices row by row, for tables of what goes where.
    return_routing: Whether layers return every token's routing beside their sums.
    compare: Whether gates that are trees tell of each domain, and what; None for no.
  """

  id: jax.Array
  position: jax.Array
  segment: jax.Array
  slot: jax.Array
  replayed_experts: jax.Array | None = None
  domain: jax.Array | None = None
  values: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
  per_sequence: bool = False
  return_routing: bool = False
  compare: Compare | None = None

  @property
  def valid(self) -> jax.Array:
    """(B, L) bool: a token that is not valid is routed and counted nowhere, writes nowhere."""
    return self.segment > 0

  def at(self, depth: jax.Array | int) -> Tokens:
    """Returns what one layer is told; `depth` may be traced."""
    if self.replayed_experts is None:
      return self
    return dataclasses.replace(self, replayed_experts=self.replayed_experts[depth])

  @classmethod
  def of_batch(cls, batch: Mapping[str, Any]) -> Tokens:
    """Returns the tokens of a packed batch (`ids`, `position`, `segment`, each (B, L))."""
    ids = jnp.asarray(batch["ids"], jnp.int32)
    slot = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    return cls(ids, jnp.asarray(batch["position"]), jnp.asarray(batch["segment"]), slot)

  @classmethod
  def of_ids(cls, ids_BL: jax.Array) -> Tokens:
    """Returns the tokens of rows that are each one whole document."""
    slot = jnp.broadcast_to(jnp.arange(ids_BL.shape[1], dtype=jnp.int32)[None], ids_BL.shape)
    return cls(ids_BL, slot, jnp.ones_like(slot), slot)
