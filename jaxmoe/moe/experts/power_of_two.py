"""Weights of few bits: powers of two, whose products are shifts, and 8-bit integers.

Powers of two: DeepShift (Elhoushi et al. 2019, arXiv:1905.13298), s * 2^P with s = sign(W) and
P = round(log2 |W|). Four bits each: a sign, and how many of 7 steps P lies below the largest one of
the matrix. There is no zero; what is smaller becomes the least power. Training keeps a full weight,
to which the gradient of the coarse one goes as it is, through rounding and sign (straight-through).
No machine here has a shift path: what is gained is the size of weights, 4 bits in place of 16.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.core.weight_formats import is_plain

STEPS = 7
"""How far below the largest exponent of a matrix the least one lies."""


def pack(weight_SDF: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (S, D * F / 2) uint8 codes, two a byte and rounded up, and (S,) int32 top exponents.

  A code has the sign in bit 3 and the steps below the top exponent in bits 0 to 2.
  """
  flat_SN = weight_SDF.astype(jnp.float32).reshape(weight_SDF.shape[0], -1)
  bits_SN = jax.lax.bitcast_convert_type(flat_SN, jnp.int32)
  exponent_SN = (bits_SN >> 23 & 255) - 127
  mantissa_SN = jax.lax.bitcast_convert_type(bits_SN & 0x7FFFFF | 127 << 23, jnp.float32)
  # round(log2 |w|) without a logarithm: 0 has the exponent -127 here and ends at the least power.
  exponent_SN += mantissa_SN > 2**0.5
  top_S1 = jnp.maximum(jnp.max(exponent_SN, axis=1, keepdims=True), -100)
  steps_SN = jnp.clip(top_S1 - exponent_SN, 0, STEPS)
  code_SN = jnp.where(flat_SN < 0, 8, 0) | steps_SN
  code_SN = jnp.pad(code_SN, ((0, 0), (0, code_SN.shape[1] % 2)))
  packed_SM = (code_SN[:, ::2] | code_SN[:, 1::2] << 4).astype(jnp.uint8)
  return packed_SM, top_S1[:, 0]


def unpack(packed_SM: jax.Array, top_S: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns the float32 powers of two of a shape (S, D, F), exactly."""
  packed_SM = packed_SM.astype(jnp.int32)
  code_SN = jnp.stack([packed_SM & 15, packed_SM >> 4], axis=-1).reshape(shape[0], -1)
  code_SN = code_SN[:, : shape[1] * shape[2]]
  exponent_SN = top_S[:, None] - (code_SN & STEPS) + 127
  bits_SN = (code_SN >> 3) << 31 | exponent_SN << 23
  return jax.lax.bitcast_convert_type(bits_SN, jnp.float32).reshape(shape)


def powers_of_two(weight: Any) -> jax.Array:
  """Returns what products see: the packed weight, unpacked, with the gradient going through."""
  weight_SDF = _plain(weight, "shift")
  return _straight_through(weight_SDF, unpack(*pack(weight_SDF), weight_SDF.shape))


def integers(weight: Any) -> jax.Array:
  """Returns what products see: multiples of 1/127 of the largest of each column (S, :, F)."""
  weight_SDF = _plain(weight, "int8").astype(jnp.float32)
  scale_S1F = jnp.maximum(jnp.max(jnp.abs(weight_SDF), axis=1, keepdims=True), 1e-20) / 127
  codes_SDF = jnp.round(weight_SDF / scale_S1F).astype(jnp.int8)
  return _straight_through(weight_SDF, codes_SDF.astype(jnp.float32) * scale_S1F)


def _straight_through(weight: jax.Array, coarse: jax.Array) -> jax.Array:
  """Returns `coarse` exactly, whose gradient is that of `weight`."""
  weight = weight.astype(jnp.float32)
  return jax.lax.stop_gradient(coarse) + (weight - jax.lax.stop_gradient(weight))


def _plain(weight: Any, kind: str) -> jax.Array:
  if not is_plain(weight):
    raise InputError(
      f"{kind} experts round plain weights, and this is a {type(weight).__name__}; "
      "leave these experts out of what is adapted"
    )
  return weight
