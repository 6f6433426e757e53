"""Normalization: by the root mean square (Zhang and Sennrich 2019, eq. 4), and LayerNorm.

The statistics and the product with the scale are taken in float32 whatever the input's type, and
only the result is rounded: in bfloat16 the square alone would lose half of the digits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _last(x: jax.Array) -> jax.Array:
  return jnp.mean(x, axis=-1, keepdims=True)


def rms_norm(
  x: jax.Array, scale_D: jax.Array, eps: float, mean: Callable[[jax.Array], jax.Array] = _last
) -> jax.Array:
  """Returns x / sqrt(mean(x^2) + eps) * scale, in x.dtype.

  Args:
    x: (..., *D).
    scale_D: Of the last dims of x.
    eps: What keeps a zero from being divided by.
    mean: Of what is normalised together; of the last dim if not given.
  """
  x_f32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(mean(x_f32 * x_f32) + eps)
  scale = scale_D.astype(jnp.float32).reshape((1,) * (x.ndim - scale_D.ndim) + scale_D.shape)
  return (x_f32 * inverse * scale).astype(x.dtype)


def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
  """Returns (x - mean) / sqrt(variance + eps) * scale + bias over the last dim, in x.dtype.

  Ba, Kiros and Hinton 2016, section 3.1.
  """
  x_f32 = x.astype(jnp.float32)
  x_f32 = x_f32 - jnp.mean(x_f32, axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + eps)
  shape = (1,) * (x.ndim - 1) + scale_D.shape
  scale, bias = (leaf.astype(jnp.float32).reshape(shape) for leaf in (scale_D, bias_D))
  return (x_f32 * inverse * scale + bias).astype(x.dtype)
