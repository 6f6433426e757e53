"""Stick-breaking attention block by block: no (L, S) array but the mask is ever held.

A block of queries sweeps the blocks of keys from the last to the first and carries the logarithm
of what is left of each query's stick. Blocks before the first and after the last key that some
query of the block sees are skipped. No running maximum: all logarithms are at most 0.

The backward pass, with w_j = A_j (do . v_j): dz_j = (1 - beta_j) w_j - beta_j sum_{l<j} w_l. It
sweeps once more for what was left at each block's end, then from the first block to the last for
the sums of w. Sums of both kinds grow from their small end, nothing is subtracted.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.ops.attention.masked_softmax import check_shapes

BLOCK = 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def stick_blocks(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BLS: jax.Array, scale: float,
  block: int = BLOCK,
) -> jax.Array:
  """Returns what `stick_breaking` does, up to rounding; blocks have `block` queries and keys."""
  return _forward(q_BLNH, k_BSKH, v_BSKH, mask_BLS, scale, block)[0]


def _forward(q_BLNH: Any, k_BSKH: Any, v_BSKH: Any, mask_BLS: Any, scale: float, block: int) -> Any:
  check_shapes(q_BLNH, k_BSKH, mask_BLS)
  q, k, v, mask = _cut(q_BLNH, k_BSKH, v_BSKH, mask_BLS, block)

  def of_queries(inputs: Any) -> jax.Array:
    q_BKGlH, mask_blocks = inputs
    first, last = _range(mask_blocks)

    def step(i: jax.Array, carry: Any) -> Any:
      out_BKGlH, left_BKGl = carry
      j = last - 1 - i
      share, _, taken = _shares(q_BKGlH, k[j], mask_blocks[j], left_BKGl, scale)
      out_BKGlH = out_BKGlH + _product("bkgls,bksh->bkglh", share.astype(v.dtype), v[j])
      return out_BKGlH, left_BKGl + taken

    zeros = jnp.zeros(q_BKGlH.shape, jnp.float32)
    return jax.lax.fori_loop(0, last - first, step, (zeros, zeros[..., 0]))[0]

  out = jax.lax.map(of_queries, (q, mask))
  return _joined(out, q_BLNH), (q_BLNH, k_BSKH, v_BSKH, mask_BLS)


def _backward(scale: float, block: int, saved: Any, dout_BLNH: jax.Array) -> Any:
  q_BLNH, k_BSKH, v_BSKH, mask_BLS = saved
  q, k, v, mask = _cut(q_BLNH, k_BSKH, v_BSKH, mask_BLS, block)
  dout = _cut(dout_BLNH, k_BSKH, v_BSKH, mask_BLS, block)[0]

  def of_queries(sums: Any, inputs: Any) -> Any:
    q_BKGlH, dout_BKGlH, mask_blocks = inputs
    first, last = _range(mask_blocks)
    left_SBKGl = _left(q_BKGlH, k, mask_blocks, scale)

    def step(j: jax.Array, carry: Any) -> Any:
      dq, dk, dv, before_BKGl = carry
      share, beta, _ = _shares(q_BKGlH, k[j], mask_blocks[j], left_SBKGl[j], scale)
      w_BKGls = share * _product("bkglh,bksh->bkgls", dout_BKGlH, v[j])
      earlier = before_BKGl[..., None] + _after(w_BKGls[..., ::-1])[..., ::-1]
      dz = jnp.where(mask_blocks[j][:, None, None], (1 - beta) * w_BKGls - beta * earlier, 0.0)
      dz = (scale * dz).astype(k.dtype)
      dq = dq + _product("bkgls,bksh->bkglh", dz, k[j])
      dk = dk.at[j].add(_product("bkgls,bkglh->bksh", dz, q_BKGlH))
      dv = dv.at[j].add(_product("bkgls,bkglh->bksh", share.astype(v.dtype), dout_BKGlH))
      return dq, dk, dv, before_BKGl + jnp.sum(w_BKGls, axis=-1)

    zeros = jnp.zeros(q_BKGlH.shape, jnp.float32)
    carry = jax.lax.fori_loop(first, last, step, (zeros, *sums, zeros[..., 0]))
    return carry[1:3], carry[0]

  none = jnp.zeros(k.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(of_queries, (none, none), (q, dout, mask))
  return _joined(dq, q_BLNH), _joined_keys(dk, k_BSKH), _joined_keys(dv, v_BSKH), None


stick_blocks.defvjp(_forward, _backward)


def _shares(
  q_BKGlH: jax.Array, k_BKsH: jax.Array, mask_Bls: jax.Array, left_BKGl: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns A and beta of a block of keys, and the logarithm of what the block leaves.

  `left_BKGl` is the logarithm of what keys after the block have left.
  """
  mask = mask_Bls[:, None, None]
  score = jnp.where(mask, scale * _product("bkglh,bksh->bkgls", q_BKGlH, k_BKsH), 0.0)
  leaves = jnp.where(mask, jax.nn.log_sigmoid(-score), 0.0)
  after = left_BKGl[..., None] + _after(leaves)
  share = jnp.where(mask, jnp.exp(jax.nn.log_sigmoid(score) + after), 0.0)
  return share, jax.nn.sigmoid(score), jnp.sum(leaves, axis=-1)


def _left(q_BKGlH: jax.Array, k: jax.Array, mask_blocks: jax.Array, scale: float) -> jax.Array:
  """Returns the logarithm of what is left at the end of each block of keys."""
  first, last = _range(mask_blocks)

  def step(i: jax.Array, carry: Any) -> Any:
    all_left, left_BKGl = carry
    j = last - 1 - i
    taken = _shares(q_BKGlH, k[j], mask_blocks[j], left_BKGl, scale)[2]
    return all_left.at[j].set(left_BKGl), left_BKGl + taken

  none = jnp.zeros((k.shape[0], *q_BKGlH.shape[:-1]), jnp.float32)
  return jax.lax.fori_loop(0, last - first, step, (none, none[0]))[0]


def _range(mask_blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the first block with a key that is seen, and one past the last."""
  seen = jnp.any(mask_blocks, axis=(1, 2, 3))
  last = seen.shape[0] - jnp.argmax(seen[::-1])
  return jnp.argmax(seen), jnp.where(jnp.any(seen), last, 0)


def _after(values: jax.Array) -> jax.Array:
  """Returns for each entry the sum of those after it in the last dim."""
  size = values.shape[-1]
  # A matmul is what accelerators do fastest, but theirs would round float32 if it might.
  ones = jnp.tril(jnp.ones((size, size), jnp.float32), -1)
  return jnp.matmul(values, ones, precision=jax.lax.Precision.HIGHEST)


def _product(spec: str, one: jax.Array, other: jax.Array) -> jax.Array:
  return jnp.einsum(spec, one, other, preferred_element_type=jnp.float32)


def _cut(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BLS: jax.Array, block: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns blocks: q (i, B, K, G, l, H), k and v (j, B, K, s, H), the mask (i, j, B, l, s)."""
  batch, length, heads, size = q_BLNH.shape
  slots, kv_heads = k_BSKH.shape[1:3]
  rows, keys = min(block, length), min(block, slots)
  more_l, more_s = -length % rows, -slots % keys
  q = jnp.pad(q_BLNH, [(0, 0), (0, more_l), (0, 0), (0, 0)])
  q = q.reshape(batch, -1, rows, kv_heads, heads // kv_heads, size)
  k, v = (
    jnp.pad(x, [(0, 0), (0, more_s), (0, 0), (0, 0)])
    .reshape(batch, -1, keys, kv_heads, size).transpose(1, 0, 3, 2, 4)
    for x in (k_BSKH, v_BSKH)
  )  # fmt: skip
  mask = jnp.pad(mask_BLS, [(0, 0), (0, more_l), (0, more_s)])
  mask = mask.reshape(batch, q.shape[1], rows, -1, keys).transpose(1, 3, 0, 2, 4)
  return q.transpose(1, 0, 3, 4, 2, 5), k, v, mask


def _joined(blocks: jax.Array, like_BLNH: jax.Array) -> jax.Array:
  """Returns blocks of queries as (B, L, N, H) in the dtype of `like_BLNH`."""
  batch, length, heads, size = like_BLNH.shape
  rows = blocks.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, size)
  return rows[:, :length].astype(like_BLNH.dtype)


def _joined_keys(blocks: jax.Array, like_BSKH: jax.Array) -> jax.Array:
  """Returns blocks of keys as (B, S, K, H) in the dtype of `like_BSKH`."""
  batch, slots, heads, size = like_BSKH.shape
  rows = blocks.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, size)
  return rows[:, :slots].astype(like_BSKH.dtype)
