"""Attention written out: scores, masked softmax in float32, weighted sum of values."""

import chex
import jax
import jax.numpy as jnp

from jaxmoe.ops.attention.merge import AttentionPart
from jaxmoe.ops.attention.sight import Sight


def reference(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKP: jax.Array, sight: Sight
) -> AttentionPart:
  """Returns softmax(scale * q k^T, over the keys in sight) v, and the log of its sums.

  Holds (B, N, L, S) float32 scores.
  """
  score_BKGLS, mask_BKGLS = scores(q_BLNH, k_BSKH, v_BSKP, sight)
  # The lowest finite number, not -inf: a row without keys would give inf - inf.
  score_BKGLS = jnp.where(mask_BKGLS, score_BKGLS, jnp.finfo(jnp.float32).min)
  peak = jax.lax.stop_gradient(jnp.max(score_BKGLS, axis=-1, keepdims=True))
  if sight.sink_N is not None:
    sink = sight.sink_N.astype(jnp.float32).reshape(1, *score_BKGLS.shape[1:3], 1, 1)
    peak = jnp.maximum(peak, jax.lax.stop_gradient(sink))
  prob_BKGLS = jnp.where(mask_BKGLS, jnp.exp(score_BKGLS - peak), 0.0)
  total = jnp.sum(prob_BKGLS, axis=-1, keepdims=True)
  if sight.sink_N is not None:
    total = total + jnp.exp(sink - peak)
  some = total > 0
  total = jnp.where(some, total, 1.0)
  lse_BKGL1 = jnp.where(some, peak + jnp.log(total), -jnp.inf)
  lse_BLN = jnp.moveaxis(lse_BKGL1[..., 0], 3, 1).reshape(q_BLNH.shape[:3])
  return AttentionPart(mix(prob_BKGLS / total, v_BSKP, q_BLNH), lse_BLN)


def scores(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKP: jax.Array, sight: Sight
) -> tuple[jax.Array, jax.Array]:
  """Returns float32 scale * q k^T as (B, K, N / K, L, S), and the mask in that shape."""
  sight.check(q_BLNH, k_BSKH, v_BSKP)
  batch, num_queries, num_heads, head_size = q_BLNH.shape
  num_kv_heads = k_BSKH.shape[2]
  q_BLKGH = q_BLNH.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_size)
  score_BKGLS = sight.scale * jnp.einsum(
    "blkgh,bskh->bkgls", q_BLKGH, k_BSKH, preferred_element_type=jnp.float32
  )
  return score_BKGLS, jnp.broadcast_to(sight.dense()[:, None, None], score_BKGLS.shape)


def mix(prob_BKGLS: jax.Array, v_BSKP: jax.Array, like_BLNH: jax.Array) -> jax.Array:
  """Returns the values weighted by `prob_BKGLS`, float32, in `like_BLNH`'s heads."""
  chex.assert_axis_dimension(v_BSKP, 1, prob_BKGLS.shape[-1])
  # For one query XLA turns the values round first, unless heads come before it in what is made.
  one = prob_BKGLS.shape[3] == 1
  spec = "bkgls,bskh->bkglh" if one else "bkgls,bskh->blkgh"
  out = jnp.einsum(
    spec, prob_BKGLS.astype(v_BSKP.dtype), v_BSKP, preferred_element_type=jnp.float32
  )
  return out.reshape(*like_BLNH.shape[:3], v_BSKP.shape[-1])
