"""Rotary position embedding (Su et al. 2021, eq. 34), in Llama's rotate-half convention.

Head channel i is paired with channel i + H/2 and the pair is turned by position * theta^(-2i/H).
The paper pairs neighbours (2i, 2i + 1) instead: the two differ by a permutation of the channels, so
weights trained under one convention need their query and key rows permuted for the other.
"""

import chex
import jax
import jax.numpy as jnp


def rope(x_BLNH: jax.Array, position_BL: jax.Array, theta: float) -> jax.Array:
  """Returns x with each head's channel pairs turned by its token's position, in x.dtype.

  Angles, sines and products are float32: positions stay exact up to 2^24.
  """
  chex.assert_rank(x_BLNH, 4)
  chex.assert_shape(position_BL, x_BLNH.shape[:2])
  half = x_BLNH.shape[-1] // 2
  if x_BLNH.shape[-1] != 2 * half:
    raise ValueError(f"rope pairs channels, so the head size must be even: {x_BLNH.shape=}")
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = position_BL.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_BLNH.dtype)
