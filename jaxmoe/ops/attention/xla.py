"""Attention through `jax.nn.dot_product_attention`, which XLA may fuse on accelerators."""

import jax
import jax.numpy as jnp

from jaxmoe.ops.attention.masked_softmax import scores
from jaxmoe.ops.attention.merge import AttentionPart
from jaxmoe.ops.attention.sight import Sight


def xla(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, sight: Sight) -> AttentionPart:
  """Returns what `reference` does, up to rounding; without sinks, values of the size of keys.

  The library averages all values for a query that sees no key, so those rows are set to zero here,
  which also stops their gradient. Its log-sum-exp has none and is rounded: where one is asked for,
  scores are made once more.
  """
  score_BKGLS, mask_BKGLS = scores(q_BLNH, k_BSKH, v_BSKH, sight)
  mask_BLS = sight.dense()
  out_BLNH = jax.nn.dot_product_attention(
    q_BLNH, k_BSKH, v_BSKH, mask=mask_BLS[:, None], scale=sight.scale, implementation="xla"
  )
  sees_BL = jnp.any(mask_BLS, axis=-1)
  out_BLNH = jnp.where(sees_BL[:, :, None, None], out_BLNH, jnp.zeros((), out_BLNH.dtype))
  lse_BKGL = jax.nn.logsumexp(score_BKGLS, axis=-1, where=mask_BKGLS)
  lse_BLN = jnp.moveaxis(lse_BKGL, 3, 1).reshape(q_BLNH.shape[:3])
  return AttentionPart(out_BLNH.astype(jnp.float32), lse_BLN)
