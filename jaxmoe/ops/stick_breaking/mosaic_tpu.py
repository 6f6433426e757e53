"""Stick-breaking attention as TPU kernels (Pallas): no (L, S) array is ever held.

The sweeps are those of `blocks.py`. Forward, a block of queries walks its blocks of keys from the
last to the first and carries the logarithm of what is left. Backward, it walks them twice, down for
what was left at each block's end and up for the sums of w, and writes both down for the kernel that
walks the queries of each block of keys: 2 L S / (keys of a block) float32 a head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxmoe.ops.attention.sight import Sight
from jaxmoe.ops.attention.tpu_walk import (
  Steps,
  Tiles,
  Walk,
  downward,
  heads_first,
  heads_last,
  mask,
  upward,
)
from jaxmoe.ops.stick_breaking.stick_part import StickPart
from jaxmoe.ops.tpu_kernel import call, dot

CHIP = Tiles()


def mosaic_tpu(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKP: jax.Array, sight: Sight, tiles: Tiles = CHIP
) -> StickPart:
  """Returns what `reference` does, up to rounding; of masks that are spans."""
  sight.check(q_BLNH, k_BSKH, v_BSKP)
  walk, length = Walk.of(sight, tiles), q_BLNH.shape[1]
  q, (k, v) = heads_first(q_BLNH, tiles.queries), _keys(k_BSKH, v_BSKP, tiles)
  out_BNLP, left_BN1L = _attend(q, k, v, walk, sight.scale, tiles)
  return StickPart(heads_last(out_BNLP, length), left_BN1L[:, :, 0, :length].swapaxes(1, 2))


def _keys(k_BSKH: jax.Array, v_BSKP: jax.Array, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
  return heads_first(k_BSKH, tiles.keys), heads_first(v_BSKP, tiles.keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
  q_BNLH: jax.Array, k_BKSH: jax.Array, v_BKSP: jax.Array, walk: Walk, scale: float, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
  return _forward(q_BNLH, k_BKSH, v_BKSP, walk, scale, tiles)[0]


def _forward(q: Any, k: Any, v: Any, walk: Walk, scale: float, tiles: Tiles) -> Any:
  batch, heads, length, size = q.shape
  values, group = v.shape[3], heads // k.shape[1]
  steps = Steps.over_keys(tiles, group, downward)
  rows = jax.ShapeDtypeStruct((batch, heads, length, values), jnp.float32)
  numbers = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
  found = call(
    functools.partial(_forward_kernel, scale),
    (batch, heads, length // tiles.queries, k.shape[2] // tiles.keys),
    walk.keys_of,
    [
      *zip(walk.masks, steps.spans(), strict=True),
      (q, steps.query_rows(size)), (k, steps.key_rows(size)), (v, steps.key_rows(values)),
    ],
    [(rows, steps.query_rows(values)), (numbers, steps.query_numbers())],
    [(values, tiles.queries), (1, tiles.queries)],
    tiles.interpret,
  )  # fmt: skip
  return tuple(found), (q, k, v, walk)


def _forward_kernel(
  scale: float, low: Any, high: Any, first: Any, last: Any, slot: Any, q: Any, k: Any, v: Any,
  out: Any, left_out: Any, found_Pl: Any, left_1l: Any,
) -> None:  # fmt: skip
  b, i, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)

  @pl.when(t == 0)
  def _() -> None:
    found_Pl[...] = jnp.zeros_like(found_Pl)
    left_1l[...] = jnp.zeros_like(left_1l)

  @pl.when(t <= high[b, i] - low[b, i])
  def _() -> None:
    share, _, taken = _shares(k, q, mask(first, last, slot), left_1l[...], scale)
    found_Pl[...] += dot("sp,sl", v[...], share.astype(v.dtype))
    left_1l[...] += taken

  @pl.when(t == pl.num_programs(3) - 1)
  def _() -> None:
    out[...] = found_Pl[...].T
    left_out[...] = left_1l[...]


def _shares(
  k: Any, q: Any, mask_sl: jax.Array, left_1l: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns A and beta (s, l) of a block, and the logarithm of what it leaves, (1, l).

  `left_1l` is the logarithm of what keys after the block have left.
  """
  score_sl = jnp.where(mask_sl, scale * dot("sh,lh", k[...], q[...]), 0.0)
  leaves_sl = jnp.where(mask_sl, _log_sigmoid(-score_sl), 0.0)
  after_sl = left_1l + dot("ts,tl", _earlier(leaves_sl.shape[0]), leaves_sl)
  share_sl = jnp.where(mask_sl, jnp.exp(_log_sigmoid(score_sl) + after_sl), 0.0)
  return share_sl, jax.nn.sigmoid(score_sl), jnp.sum(leaves_sl, axis=0, keepdims=True)


def _log_sigmoid(x: jax.Array) -> jax.Array:
  return jnp.minimum(x, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(x)))


def _earlier(size: int) -> jax.Array:
  """Returns (t, s) float32, 1 where s comes before t."""
  row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
  column = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
  return (column < row).astype(jnp.float32)


def _backward(scale: float, tiles: Tiles, saved: Any, cotangents: Any) -> Any:
  q, k, v, walk = saved
  dout, dleft_BN1L = cotangents
  dout = dout.astype(q.dtype)
  dq, left, before = _query_gradients(q, k, v, walk, (dout, dleft_BN1L), scale, tiles)
  dk, dv = _key_gradients(q, k, v, walk, (dout, left, before), scale, tiles)
  return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _query_gradients(
  q: Any, k: Any, v: Any, walk: Walk, given: Any, scale: float, tiles: Tiles
) -> Any:
  """Returns dq, and of each query at each block of keys what is left and the sum of w before."""
  batch, heads, length, size = q.shape
  values, blocks = v.shape[3], k.shape[2] // tiles.keys

  def visit(t: Any, low: Any, high: Any) -> Any:
    return jnp.where(t < blocks, downward(t, low, high), upward(t - blocks, low, high))

  def visit_up(t: Any, low: Any, high: Any) -> Any:  # nothing is written on the way down
    return upward(jnp.maximum(t - blocks, 0), low, high)

  group = heads // k.shape[1]
  steps, up = (Steps.over_keys(tiles, group, each) for each in (visit, visit_up))
  pairs = jax.ShapeDtypeStruct((batch, heads, blocks, 1, length), jnp.float32)
  return call(
    functools.partial(_query_gradient_kernel, scale, blocks),
    (batch, heads, length // tiles.queries, 2 * blocks),
    walk.keys_of,
    [
      *zip(walk.masks, steps.spans(), strict=True),
      (q, steps.query_rows(size)), (k, steps.key_rows(size)), (v, steps.key_rows(values)),
      (given[0], steps.query_rows(values)), (given[1], steps.query_numbers()),
    ],
    [
      (jax.ShapeDtypeStruct(q.shape, q.dtype), steps.query_rows(size)),
      (pairs, up.pair_numbers()), (pairs, up.pair_numbers()),
    ],
    [(size, tiles.queries), (1, tiles.queries), (1, tiles.queries), (blocks, 1, tiles.queries)],
    tiles.interpret,
  )  # fmt: skip


def _query_gradient_kernel(
  scale: float, blocks: int, low: Any, high: Any, first: Any, last: Any, slot: Any, q: Any, k: Any,
  v: Any, dout: Any, dleft: Any, dq: Any, left_out: Any, before_out: Any, dq_Hl: Any, left_1l: Any,
  before_1l: Any, left_j1l: Any,
) -> None:  # fmt: skip
  b, i, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  count, up = high[b, i] - low[b, i] + 1, t - blocks

  @pl.when(t == 0)
  def _() -> None:
    dq_Hl[...] = jnp.zeros_like(dq_Hl)
    left_1l[...] = jnp.zeros_like(left_1l)
    # What is left is asked for too: a key that takes more of it leaves less.
    before_1l[...] = dleft[...]

  @pl.when(t < jnp.minimum(count, blocks))
  def _() -> None:
    left_j1l[downward(t, low[b, i], high[b, i])] = left_1l[...]
    left_1l[...] += _shares(k, q, mask(first, last, slot), left_1l[...], scale)[2]

  @pl.when((up >= 0) & (up < count))
  def _() -> None:
    left = left_j1l[low[b, i] + up]
    left_out[...], before_out[...] = left, before_1l[...]
    _, w_sl, dz_sl = _pulled(
      k, q, v, dout, mask(first, last, slot), left, before_1l[...], scale
    )
    dq_Hl[...] += dot("sh,sl", k[...], dz_sl)
    before_1l[...] += jnp.sum(w_sl, axis=0, keepdims=True)

  @pl.when(t == pl.num_programs(3) - 1)
  def _() -> None:
    dq[...] = dq_Hl[...].T.astype(dq.dtype)


def _pulled(
  k: Any, q: Any, v: Any, dout: Any, mask_sl: jax.Array, left_1l: jax.Array, before_1l: jax.Array,
  scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
  """Returns A, w and the gradient of the products of queries and keys in a block."""
  share_sl, beta_sl, _ = _shares(k, q, mask_sl, left_1l, scale)
  w_sl = share_sl * dot("sp,lp", v[...], dout[...])
  earlier_sl = before_1l + dot("st,tl", _earlier(w_sl.shape[0]), w_sl)
  dz_sl = jnp.where(mask_sl, (1 - beta_sl) * w_sl - beta_sl * earlier_sl, 0.0)
  return share_sl, w_sl, (scale * dz_sl).astype(k.dtype)


def _key_gradients(
  q: Any, k: Any, v: Any, walk: Walk, given: Any, scale: float, tiles: Tiles
) -> Any:
  """Returns dk and dv."""
  batch, kv_heads, slots, size = k.shape
  group, blocks, values = q.shape[1] // kv_heads, q.shape[2] // tiles.queries, v.shape[3]
  steps = Steps.over_queries(tiles, group, blocks)
  return call(
    functools.partial(_key_gradient_kernel, scale, blocks),
    (batch, kv_heads, slots // tiles.keys, group * blocks),
    walk.queries_of,
    [
      *zip(walk.masks, steps.spans(), strict=True),
      (q, steps.query_rows(size)), (k, steps.key_rows(size)), (v, steps.key_rows(values)),
      (given[0], steps.query_rows(values)),
      (given[1], steps.pair_numbers()), (given[2], steps.pair_numbers()),
    ],
    [
      (jax.ShapeDtypeStruct(k.shape, k.dtype), steps.key_rows(size)),
      (jax.ShapeDtypeStruct(v.shape, v.dtype), steps.key_rows(values)),
    ],
    [(tiles.keys, size), (tiles.keys, values)],
    tiles.interpret,
  )  # fmt: skip


def _key_gradient_kernel(
  scale: float, blocks: int, low: Any, high: Any, first: Any, last: Any, slot: Any, q: Any, k: Any,
  v: Any, dout: Any, left: Any, before: Any, dk: Any, dv: Any, dk_sH: Any, dv_sP: Any,
) -> None:  # fmt: skip
  b, j, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)

  @pl.when(t == 0)
  def _() -> None:
    dk_sH[...] = jnp.zeros_like(dk_sH)
    dv_sP[...] = jnp.zeros_like(dv_sP)

  @pl.when(jax.lax.rem(t, blocks) <= high[b, j] - low[b, j])
  def _() -> None:
    share_sl, _, dz_sl = _pulled(
      k, q, v, dout, mask(first, last, slot), left[...], before[...], scale
    )
    dk_sH[...] += dot("sl,lh", dz_sl, q[...])
    dv_sP[...] += dot("sl,lp", share_sl.astype(v.dtype), dout[...])

  @pl.when(t == pl.num_programs(3) - 1)
  def _() -> None:
    dk[...] = dk_sH[...].astype(dk.dtype)
    dv[...] = dv_sP[...].astype(dv.dtype)
