"""Stick-breaking attention block by block: no (L, S) array is ever held.

A block of queries sweeps the blocks of keys from the last to the first and carries the logarithm
of what is left of each query's stick. Blocks of which no query of the block sees a key are skipped.
No running maximum: all logarithms are at most 0.

The backward pass, with w_j = A_j (do . v_j): dz_j = (1 - beta_j) w_j - beta_j sum_{l<j} w_l. It
sweeps once more for what was left at each block's end, then from the first block to the last for
the sums of w. Sums of both kinds grow from their small end, nothing is subtracted.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.ops.attention.seen_blocks import cut_spans, seen_blocks, visits
from jaxmoe.ops.attention.sight import Sight, sees
from jaxmoe.ops.stick_breaking.stick_part import StickPart

BLOCK = 64


def blocks(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKP: jax.Array, sight: Sight, block: int = BLOCK
) -> StickPart:
  """Returns what `reference` does, up to rounding; blocks have `block` queries and keys."""
  sight.check(q_BLNH, k_BSKH, v_BSKP)
  return StickPart(*_attend(q_BLNH, k_BSKH, v_BSKP, sight.spans, sight.scale, block))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKP: jax.Array, spans: Any, scale: float, block: int
) -> tuple[jax.Array, jax.Array]:
  return _forward(q_BLNH, k_BSKH, v_BSKP, spans, scale, block)[0]


def _forward(q_BLNH: Any, k_BSKH: Any, v_BSKP: Any, spans: Any, scale: float, block: int) -> Any:
  q, k, v = _cut(q_BLNH, k_BSKH, v_BSKP, block)
  seen = _SeenBlocks.of(spans, (q.shape[-2], k.shape[-2]))

  def of_queries(inputs: Any) -> Any:
    i, q_BKGlH = inputs

    def step(at: jax.Array, carry: Any) -> Any:
      out_BKGlP, left_BKGl = carry
      j = seen.order_ij[i, seen.count_i[i] - 1 - at]
      share, _, taken = _shares(q_BKGlH, k[j], seen.mask(i, j), left_BKGl, scale)
      out_BKGlP = out_BKGlP + _product("bkgls,bksh->bkglh", share.astype(v.dtype), v[j])
      return out_BKGlP, left_BKGl + taken

    none = jnp.zeros(q_BKGlH.shape[:-1], jnp.float32)
    out = jnp.zeros((*none.shape, v.shape[-1]), jnp.float32)
    return jax.lax.fori_loop(0, seen.count_i[i], step, (out, none))

  out, left = jax.lax.map(of_queries, (jnp.arange(q.shape[0]), q))
  shape = q_BLNH.shape[:3]
  found = _joined(out, shape), _joined(left[..., None], shape)[..., 0]
  return found, (q_BLNH, k_BSKH, v_BSKP, spans)


def _backward(scale: float, block: int, saved: Any, cotangents: Any) -> Any:
  q_BLNH, k_BSKH, v_BSKP, spans = saved
  dout_BLNP, dleft_BLN = cotangents
  q, k, v = _cut(q_BLNH, k_BSKH, v_BSKP, block)
  dout, dleft = (
    _cut(x, k_BSKH, v_BSKP, block)[0]
    for x in (dout_BLNP.astype(q_BLNH.dtype), dleft_BLN[..., None])
  )
  seen = _SeenBlocks.of(spans, (q.shape[-2], k.shape[-2]))

  def of_queries(sums: Any, inputs: Any) -> Any:
    i, q_BKGlH, dout_BKGlP, dleft_BKGl1 = inputs
    left_SBKGl = _left(i, q_BKGlH, k, seen, scale)

    def step(at: jax.Array, carry: Any) -> Any:
      dq, dk, dv, before_BKGl = carry
      j = seen.order_ij[i, at]
      mask = seen.mask(i, j)
      share, beta, _ = _shares(q_BKGlH, k[j], mask, left_SBKGl[j], scale)
      w_BKGls = share * _product("bkglh,bksh->bkgls", dout_BKGlP, v[j])
      earlier = before_BKGl[..., None] + _after(w_BKGls[..., ::-1])[..., ::-1]
      dz = jnp.where(mask[:, None, None], (1 - beta) * w_BKGls - beta * earlier, 0.0)
      dz = (scale * dz).astype(k.dtype)
      dq = dq + _product("bkgls,bksh->bkglh", dz, k[j])
      dk = dk.at[j].add(_product("bkgls,bkglh->bksh", dz, q_BKGlH))
      dv = dv.at[j].add(_product("bkgls,bkglh->bksh", share.astype(v.dtype), dout_BKGlP))
      return dq, dk, dv, before_BKGl + jnp.sum(w_BKGls, axis=-1)

    zeros = jnp.zeros(q_BKGlH.shape, jnp.float32)
    # What is left is asked for too: a key that takes more of it leaves less.
    carry = (zeros, *sums, dleft_BKGl1[..., 0])
    carry = jax.lax.fori_loop(0, seen.count_i[i], step, carry)
    return carry[1:3], carry[0]

  none = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  inputs = (jnp.arange(q.shape[0]), q, dout, dleft)
  (dk, dv), dq = jax.lax.scan(of_queries, none, inputs)
  dq_BLNH = _joined(dq, q_BLNH.shape[:3]).astype(q_BLNH.dtype)
  return dq_BLNH, _joined_keys(dk, k_BSKH), _joined_keys(dv, v_BSKP), None


_attend.defvjp(_forward, _backward)


class _SeenBlocks(NamedTuple):
  """What each block of queries sees in any row of the batch: blocks of keys, in order, and keys."""

  order_ij: jax.Array
  count_i: jax.Array
  first_Bil: jax.Array
  last_Bil: jax.Array
  slot_Bjs: jax.Array

  @classmethod
  def of(cls, spans: Any, sizes: tuple[int, int]) -> _SeenBlocks:
    """Returns what blocks of so many queries and keys see."""
    cut = cut_spans(spans, *sizes)
    order_1ij, count_1i = visits(jnp.any(seen_blocks(*cut), axis=0, keepdims=True))
    return cls(order_1ij[0], count_1i[0], *cut)

  def mask(self, i: jax.Array, j: jax.Array) -> jax.Array:
    """Returns (B, l, s) bool, which query of block i sees which key of block j."""
    return sees(self.first_Bil[:, i], self.last_Bil[:, i], self.slot_Bjs[:, j])


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


def _left(
  i: jax.Array, q_BKGlH: jax.Array, k: jax.Array, seen: _SeenBlocks, scale: float
) -> jax.Array:
  """Returns the logarithm of what is left at the end of each block of keys."""

  def step(at: jax.Array, carry: Any) -> Any:
    all_left, left_BKGl = carry
    j = seen.order_ij[i, seen.count_i[i] - 1 - at]
    taken = _shares(q_BKGlH, k[j], seen.mask(i, j), left_BKGl, scale)[2]
    return all_left.at[j].set(left_BKGl), left_BKGl + taken

  none = jnp.zeros((k.shape[0], *q_BKGlH.shape[:-1]), jnp.float32)
  return jax.lax.fori_loop(0, seen.count_i[i], step, (none, none[0]))[0]


def _after(values: jax.Array) -> jax.Array:
  """Returns for each entry the sum of those after it in the last dim."""
  size = values.shape[-1]
  # A matmul is what accelerators do fastest, but theirs would round float32 if it might.
  ones = jnp.tril(jnp.ones((size, size), jnp.float32), -1)
  return jnp.matmul(values, ones, precision=jax.lax.Precision.HIGHEST)


def _product(spec: str, one: jax.Array, other: jax.Array) -> jax.Array:
  return jnp.einsum(spec, one, other, preferred_element_type=jnp.float32)


def _cut(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKP: jax.Array, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns blocks: q (i, B, K, G, l, H), k and v (j, B, K, s, H)."""
  batch, length, heads, size = q_BLNH.shape
  slots, kv_heads = k_BSKH.shape[1:3]
  rows, keys = min(block, length), min(block, slots)
  q = jnp.pad(q_BLNH, [(0, 0), (0, -length % rows), (0, 0), (0, 0)])
  q = q.reshape(batch, -1, rows, kv_heads, heads // kv_heads, size)
  k, v = (
    jnp.pad(x, [(0, 0), (0, -slots % keys), (0, 0), (0, 0)])
    .reshape(batch, -1, keys, kv_heads, x.shape[-1]).transpose(1, 0, 3, 2, 4)
    for x in (k_BSKH, v_BSKP)
  )  # fmt: skip
  return q.transpose(1, 0, 3, 4, 2, 5), k, v


def _joined(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns blocks of queries as (B, L, N, P)."""
  batch, length, heads = shape
  rows = blocks.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, blocks.shape[-1])
  return rows[:, :length]


def _joined_keys(blocks: jax.Array, like_BSKH: jax.Array) -> jax.Array:
  """Returns blocks of keys as (B, S, K, H) in the dtype of `like_BSKH`."""
  batch, slots, heads, size = like_BSKH.shape
  rows = blocks.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, size)
  return rows[:, :slots].astype(like_BSKH.dtype)
