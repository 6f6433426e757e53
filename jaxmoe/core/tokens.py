"""Tokens of a packed batch: id, position, segment and what is asked of their routers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Compare:
  """What gates that are trees tell of the tokens of each domain, see `ops/soft_tree.py`."""

  num_domains: int
  target: Literal["parity", "load"]


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["segment_BS", "slot_BS"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class SpreadRows:
  """What every device knows of whole rows whose tokens are spread over several, int32.

  Attributes:
    segment_BS: The document of each token, in order of slots.
    slot_BS: The slot of each token, in order of devices.
  """

  segment_BS: jax.Array
  slot_BS: jax.Array

  @property
  def whole(self) -> Tokens:
    """The tokens of the rows in order of slots, as masks ask for them: without ids."""
    slot_S = jnp.arange(self.slot_BS.shape[1], dtype=jnp.int32)
    slot_BS = jnp.broadcast_to(slot_S, self.slot_BS.shape)
    return Tokens(slot_BS, slot_BS, self.segment_BS, slot_BS)

  def part(self, device: jax.Array | int, length: int) -> Tokens:
    """Returns the `length` tokens a row that a device has, as masks ask for them: without ids."""
    slot_BL = jax.lax.dynamic_slice_in_dim(self.slot_BS, device * length, length, axis=1)
    segment_BL = jnp.take_along_axis(self.segment_BS, slot_BL, axis=1)
    return Tokens(slot_BL, slot_BL, segment_BL, slot_BL)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["id", "position", "segment", "slot", "replayed_experts", "domain", "values", "rows"],
  meta_fields=["per_sequence", "return_routing", "compare"],
)
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Per-token records, int32, of shape (B, L) unless stated otherwise.

  Attributes:
    id: The token's id in the vocabulary.
    position: Its place in its document, from 0; what rotary embeddings turn by.
    segment: Which document of the row it belongs to, from 1; 0 is padding.
    slot: Its place in the row (and in a cache), which orders it in time; that of the whole row
      where devices have parts of it.
    replayed_experts: Choices to take in place of the routers' own, (layers, B, L, A) by depth, or
      (B, L, A) inside a layer; -1 is no choice. None to let routers choose.
    domain: Which part of the data it is from, from 0; None where nobody asks.
    values: What weights ask of each token, of any dtype, (B, L, ...) by name; see
      core/weight_formats.py.
    per_sequence: Whether routers also count choices row by row, for tables of what goes where.
    return_routing: Whether layers return every token's routing beside their sums.
    compare: Whether gates that are trees tell of each domain, and what; None for no.
    rows: What is known of whole rows where devices have parts of them; None where these are whole.
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
  rows: SpreadRows | None = None

  @property
  def row_length(self) -> int:
    """How many tokens a row has, on all devices together."""
    return self.slot.shape[1] if self.rows is None else self.rows.slot_BS.shape[1]

  def draw(self, drawn: Callable[[tuple[int, ...]], jax.Array], *dims: int) -> jax.Array:
    """Returns what is drawn for each token, (T, ...), by its place in its row alone.

    Args:
      drawn: Returns draws of a shape, those of whole rows, of which each device takes its tokens'.
      dims: What is drawn for a token.
    """
    batch, length = self.slot.shape
    if self.rows is None:
      return drawn((batch * length, *dims))
    draw_BS = drawn((batch * self.row_length, *dims)).reshape(batch, self.row_length, *dims)
    index_BL = self.slot.reshape(batch, length, *[1] * len(dims))
    return jnp.take_along_axis(draw_BS, index_BL, axis=1).reshape(batch * length, *dims)

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
    """Returns the tokens of a packed batch (`ids`, `position`, `segment`, each (B, L)).

    They are in order of time unless there is a `slot`, too.
    """
    ids = jnp.asarray(batch["ids"], jnp.int32)
    slot = batch.get("slot")
    if slot is None:
      slot = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    return cls(ids, jnp.asarray(batch["position"]), jnp.asarray(batch["segment"]), slot)

  @classmethod
  def of_ids(cls, ids_BL: jax.Array) -> Tokens:
    """Returns the tokens of rows that are each one whole document."""
    slot = jnp.broadcast_to(jnp.arange(ids_BL.shape[1], dtype=jnp.int32)[None], ids_BL.shape)
    return cls(ids_BL, slot, jnp.ones_like(slot), slot)
