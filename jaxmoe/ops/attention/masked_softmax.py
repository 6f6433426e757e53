"""Attention written out: scores, masked softmax in float32, weighted sum of values."""

import chex
import jax
import jax.numpy as jnp


def reference(
  q_BLNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask_BLS: jax.Array,
  scale: float,
  sink_N: jax.Array | None = None,
) -> jax.Array:
  """Returns softmax(scale * q k^T, over the keys the mask shows) v, in q's dtype.

  Holds (B, N, L, S) float32 scores. Values may be of another size than keys. A sink is one more
  score of every query of its head, of a key whose value is zero (gpt-oss).
  """
  score_BKGLS, mask_BKGLS = scores(q_BLNH, k_BSKH, mask_BLS, scale)
  # The lowest finite number, not -inf: a row without keys would give inf - inf.
  score_BKGLS = jnp.where(mask_BKGLS, score_BKGLS, jnp.finfo(jnp.float32).min)
  peak = jax.lax.stop_gradient(jnp.max(score_BKGLS, axis=-1, keepdims=True))
  if sink_N is not None:
    sink = sink_N.astype(jnp.float32).reshape(1, *score_BKGLS.shape[1:3], 1, 1)
    peak = jnp.maximum(peak, jax.lax.stop_gradient(sink))
  prob_BKGLS = jnp.where(mask_BKGLS, jnp.exp(score_BKGLS - peak), 0.0)
  total = jnp.sum(prob_BKGLS, axis=-1, keepdims=True)
  if sink_N is not None:
    total = total + jnp.exp(sink - peak)
  prob_BKGLS = prob_BKGLS / jnp.where(total > 0, total, 1.0)
  return mix(prob_BKGLS, v_BSKH, q_BLNH)


def scores(
  q_BLNH: jax.Array, k_BSKH: jax.Array, mask_BLS: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Returns float32 scale * q k^T as (B, K, N / K, L, S), and the mask in that shape."""
  batch, num_queries, num_heads, head_size = q_BLNH.shape
  num_kv_heads = k_BSKH.shape[2]
  check_shapes(q_BLNH, k_BSKH, mask_BLS)
  group = num_heads // num_kv_heads
  q_BLKGH = q_BLNH.reshape(batch, num_queries, num_kv_heads, group, head_size)
  score_BKGLS = scale * jnp.einsum(
    "blkgh,bskh->bkgls", q_BLKGH, k_BSKH, preferred_element_type=jnp.float32
  )
  return score_BKGLS, jnp.broadcast_to(mask_BLS[:, None, None], score_BKGLS.shape)


def check_shapes(q_BLNH: jax.Array, k_BSKH: jax.Array, mask_BLS: jax.Array) -> None:
  """Refuses a mask of another shape, and key heads that do not divide query heads."""
  chex.assert_shape(mask_BLS, (*q_BLNH.shape[:2], k_BSKH.shape[1]))
  num_heads, num_kv_heads = q_BLNH.shape[2], k_BSKH.shape[2]
  if num_heads % num_kv_heads:
    raise ValueError(f"key heads must divide query heads: {num_heads=} {num_kv_heads=}")


def mix(prob_BKGLS: jax.Array, v_BSKH: jax.Array, like_BLNH: jax.Array) -> jax.Array:
  """Returns the values weighted by `prob_BKGLS`, in `like_BLNH`'s dtype and heads."""
  chex.assert_axis_dimension(v_BSKH, 1, prob_BKGLS.shape[-1])
  out_BLKGH = jnp.einsum(
    "bkgls,bskh->blkgh", prob_BKGLS.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32
  )
  shape = (*like_BLNH.shape[:3], v_BSKH.shape[-1])
  return out_BLKGH.reshape(shape).astype(like_BLNH.dtype)
