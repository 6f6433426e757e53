"""Rotary position embedding (Su et al. 2021, eq. 34), in Llama's rotate-half convention.

Head channel i is paired with channel i + H/2 and the pair is turned by position * frequency i. The
paper pairs neighbours (2i, 2i + 1) instead: the two differ by a permutation of the channels, so
weights trained under one convention need their query and key rows permuted for the other.
"""

import chex
import jax
import jax.numpy as jnp


def frequencies(theta: float, size: int) -> jax.Array:
  """Returns float32 (H/2,) theta^(-2i/H), radians a position, for heads of an even size H."""
  half = size // 2
  if size != 2 * half:
    raise ValueError(f"rope pairs channels, so the head size must be even: {size=}")
  return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


def rope(
  x_BLNH: jax.Array,
  position_BL: jax.Array,
  frequency_P: jax.Array,
  gain: float = 1.0,
  neighbours: bool = False,
) -> jax.Array:
  """Returns x with each head's channel pairs turned by its token's position, in x.dtype.

  Angles, sines and products are float32: positions stay exact up to 2^24.

  Args:
    x_BLNH: Heads.
    position_BL: Where each token stands.
    frequency_P: Radians a position of each of the H/2 pairs.
    gain: What lengths are multiplied by.
    neighbours: Whether a pair is channels 2i and 2i + 1, not i and i + H/2; the result has the
      channels in the order of x either way.
  """
  chex.assert_rank(x_BLNH, 4)
  chex.assert_shape(position_BL, x_BLNH.shape[:2])
  chex.assert_shape(frequency_P, (x_BLNH.shape[-1] // 2,))
  angle = position_BL.astype(jnp.float32)[:, :, None, None] * frequency_P[None, None, None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if gain != 1:
    cos, sin = gain * cos, gain * sin
  x = x_BLNH.astype(jnp.float32)
  first, second = (x[..., 0::2], x[..., 1::2]) if neighbours else jnp.split(x, 2, axis=-1)
  pair = [first * cos - second * sin, second * cos + first * sin]
  if neighbours:
    turned = jnp.stack(pair, axis=-1).reshape(x.shape)
  else:
    turned = jnp.concatenate(pair, axis=-1)
  return turned.astype(x_BLNH.dtype)
