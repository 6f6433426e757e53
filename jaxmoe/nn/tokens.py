"""Records of tokens for arrays that anybody has: which count, and where they stand."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens


def tokens_of(shape: tuple[int, ...], segment: jax.Array | None) -> Tokens:
  """Returns the records of tokens of shape (B, L), or (T,) for one row.

  Args:
    shape: Theirs.
    segment: Of the same shape, which document of its row a token belongs to, from 1, where its
      positions start from 0; 0 is padding, which is routed and counted nowhere. A bool says which
      tokens count. None if all do.

  Raises:
    InputError: shapes that do not fit.
  """
  if len(shape) not in (1, 2):
    raise InputError(f"inputs must be (batch, length, dim) or (tokens, dim): tokens are {shape}")
  if segment is None:
    segment = jnp.ones(shape, jnp.int32)
  if segment.shape != shape:
    raise InputError(f"segment must have a number for each token: {segment.shape}, not {shape}")
  segment_BL = jnp.atleast_2d(segment.astype(jnp.int32))
  slot = jnp.broadcast_to(jnp.arange(segment_BL.shape[1], dtype=jnp.int32)[None], segment_BL.shape)
  begins = jnp.concatenate(
    [jnp.ones_like(segment_BL[:, :1], bool), segment_BL[:, 1:] != segment_BL[:, :-1]], axis=1
  )
  first = jax.lax.cummax(jnp.where(begins, slot, 0), axis=1)
  return Tokens(jnp.zeros_like(slot), slot - first, segment_BL, slot, return_routing=True)


def keys_of(key: jax.Array | None) -> Keys | None:
  """Returns the randomness of a forward pass from a key; None where there is none."""
  return None if key is None else Keys(key)
