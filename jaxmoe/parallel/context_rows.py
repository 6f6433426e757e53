"""Rows of which devices of a context group have parts: their slots, and tokens before a part."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.core.tokens import SpreadRows, Tokens
from jaxmoe.parallel.attend import ContextGroup

LENGTH = 1  # the dim of (B, L, ...) along which a row lies


def spread_rows(tokens: Tokens, axis: str, in_order: bool) -> Tokens:
  """Returns tokens that know the documents and slots of their whole rows.

  Args:
    tokens: Of this device; their slots are the row's own unless `in_order`.
    axis: Of the context group.
    in_order: Whether devices have stretches of rows one after the other, whose slots follow.
  """
  length = tokens.slot.shape[LENGTH]
  if in_order:
    tokens = dataclasses.replace(tokens, slot=tokens.slot + jax.lax.axis_index(axis) * length)
  segment_BS, slot_BS = (
    jax.lax.all_gather(x, axis, axis=LENGTH, tiled=True) for x in (tokens.segment, tokens.slot)
  )
  if not in_order:
    by_slot_BS = jnp.argsort(slot_BS, axis=LENGTH)
    segment_BS = jnp.take_along_axis(segment_BS, by_slot_BS, axis=LENGTH)
  return dataclasses.replace(tokens, rows=SpreadRows(segment_BS, slot_BS))


def tokens_before(x_BLF: jax.Array, number: int, group: ContextGroup) -> jax.Array:
  """Returns (B, number, ...) of the tokens before a device's own; zeros before the first of a row.

  Of a part as long as that, only its last tokens are sent, to the next device.
  """
  length = x_BLF.shape[LENGTH]
  if number <= length:
    before = group.shift(x_BLF[:, length - number :], 1)
    return jnp.where(group.rank() > 0, before, jnp.zeros_like(before))
  whole = jax.lax.all_gather(x_BLF, group.axis, axis=LENGTH, tiled=True)
  padded = jnp.pad(whole, [(0, 0), (number, 0)] + [(0, 0)] * (x_BLF.ndim - 2))
  start = group.rank() * length
  return jax.lax.dynamic_slice_in_dim(padded, start, number, axis=LENGTH)
