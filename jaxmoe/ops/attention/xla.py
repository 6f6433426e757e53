"""Attention through `jax.nn.dot_product_attention`, which XLA may fuse on accelerators."""

import jax
import jax.numpy as jnp


def xla(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BLS: jax.Array, scale: float
) -> jax.Array:
  """Returns what `reference` returns, up to rounding.

  The library averages all values for a query that sees no key, so those rows are set to zero here,
  which also stops their gradient.
  """
  out_BLNH = jax.nn.dot_product_attention(
    q_BLNH, k_BSKH, v_BSKH, mask=mask_BLS[:, None], scale=scale, implementation="xla"
  )
  sees_BL = jnp.any(mask_BLS, axis=-1)
  return jnp.where(sees_BL[:, :, None, None], out_BLNH, jnp.zeros((), out_BLNH.dtype))
