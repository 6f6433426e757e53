"""Softmax attention as TPU kernels (Pallas), by spans: no (L, S) array is ever held.

FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2). A block of queries walks its
blocks of keys with a running maximum; what is left for the backward pass is the output and the
log-sum-exp. Gradients of queries, and of keys and values, are a kernel each.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxmoe.ops.attention.merge import AttentionPart, join_sink
from jaxmoe.ops.attention.sight import Sight
from jaxmoe.ops.attention.tpu_walk import (
  Steps,
  Tiles,
  Walk,
  heads_first,
  heads_last,
  mask,
  upward,
)
from jaxmoe.ops.tpu_kernel import call, dot

CHIP = Tiles()
_LOWEST = jnp.finfo(jnp.float32).min


def mosaic_tpu(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKP: jax.Array, sight: Sight, tiles: Tiles = CHIP
) -> AttentionPart:
  """Returns what `reference` does, up to rounding; of masks that are spans."""
  sight.check(q_BLNH, k_BSKH, v_BSKP)
  walk, length = Walk.of(sight, tiles), q_BLNH.shape[1]
  k, v = (heads_first(x, tiles.keys) for x in (k_BSKH, v_BSKP))
  out, lse = _attend(heads_first(q_BLNH, tiles.queries), k, v, walk, sight.scale, tiles)
  part = AttentionPart(heads_last(out, length), lse[:, :, 0, :length].swapaxes(1, 2))
  return join_sink(part, sight.sink_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
  q_BNLH: jax.Array, k_BKSH: jax.Array, v_BKSP: jax.Array, walk: Walk, scale: float, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
  return _forward(q_BNLH, k_BKSH, v_BKSP, walk, scale, tiles)[0]


def _forward(q: Any, k: Any, v: Any, walk: Walk, scale: float, tiles: Tiles) -> Any:
  batch, heads, length, size = q.shape
  values = v.shape[3]
  steps = Steps.over_keys(tiles, heads // k.shape[1], upward)
  rows = jax.ShapeDtypeStruct((batch, heads, length, values), jnp.float32)
  numbers = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
  out, lse = call(
    functools.partial(_forward_kernel, scale),
    (batch, heads, length // tiles.queries, k.shape[2] // tiles.keys),
    walk.keys_of,
    [
      *zip(walk.masks, steps.spans(), strict=True),
      (q, steps.query_rows(size)), (k, steps.key_rows(size)), (v, steps.key_rows(values)),
    ],
    [(rows, steps.query_rows(values)), (numbers, steps.query_numbers())],
    [(values, tiles.queries), (1, tiles.queries), (1, tiles.queries)],
    tiles.interpret,
  )  # fmt: skip
  return (out, lse), (q, k, v, walk, out, lse)


def _forward_kernel(
  scale: float, low: Any, high: Any, first: Any, last: Any, slot: Any, q: Any, k: Any, v: Any,
  out: Any, lse: Any, found_Pl: Any, top_1l: Any, total_1l: Any,
) -> None:  # fmt: skip
  b, i, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)

  @pl.when(t == 0)
  def _() -> None:
    found_Pl[...] = jnp.zeros_like(found_Pl)
    top_1l[...] = jnp.full_like(top_1l, _LOWEST)
    total_1l[...] = jnp.zeros_like(total_1l)

  @pl.when(t <= high[b, i] - low[b, i])
  def _() -> None:
    mask_sl, before = mask(first, last, slot), top_1l[...]
    score_sl = jnp.where(mask_sl, scale * dot("sh,lh", k[...], q[...]), _LOWEST)
    top = jnp.maximum(before, jnp.max(score_sl, axis=0, keepdims=True))
    share_sl = jnp.where(mask_sl, jnp.exp(score_sl - top), 0.0)
    shrinks = jnp.exp(before - top)
    found_Pl[...] = shrinks * found_Pl[...] + dot("sp,sl", v[...], share_sl.astype(v.dtype))
    total_1l[...] = shrinks * total_1l[...] + jnp.sum(share_sl, axis=0, keepdims=True)
    top_1l[...] = top

  @pl.when(t == pl.num_programs(3) - 1)
  def _() -> None:
    some = total_1l[...] > 0
    total = jnp.where(some, total_1l[...], 1.0)
    out[...] = (found_Pl[...] / total).T
    lse[...] = jnp.where(some, top_1l[...] + jnp.log(total), -jnp.inf)


def _backward(scale: float, tiles: Tiles, saved: Any, cotangents: Any) -> Any:
  q, k, v, walk, out, lse = saved
  dout, dlse = cotangents
  pull = jnp.sum(dout * out, axis=-1)[:, :, None] - jnp.where(jnp.isneginf(lse), 0.0, dlse)
  given = dout.astype(q.dtype), lse, pull
  dq = _query_gradients(q, k, v, walk, given, scale, tiles)
  dk, dv = _key_gradients(q, k, v, walk, given, scale, tiles)
  return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _pulled(
  k: Any, q: Any, v: Any, dout: Any, lse: Any, pull: Any, mask_sl: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Returns the shares of a block, and the gradient of the products of queries and keys."""
  score_sl = scale * dot("sh,lh", k[...], q[...])
  share_sl = jnp.where(mask_sl, jnp.exp(score_sl - lse[...]), 0.0)
  dscore_sl = share_sl * (dot("sp,lp", v[...], dout[...]) - pull[...])
  return share_sl, (scale * dscore_sl).astype(k.dtype)


def _query_gradients(
  q: Any, k: Any, v: Any, walk: Walk, given: Any, scale: float, tiles: Tiles
) -> jax.Array:
  batch, heads, length, size = q.shape
  steps = Steps.over_keys(tiles, heads // k.shape[1], upward)
  (dq,) = call(
    functools.partial(_query_gradient_kernel, scale),
    (batch, heads, length // tiles.queries, k.shape[2] // tiles.keys),
    walk.keys_of,
    _inputs(steps, q, k, v, walk, given),
    [(jax.ShapeDtypeStruct(q.shape, q.dtype), steps.query_rows(size))],
    [(size, tiles.queries)],
    tiles.interpret,
  )
  return dq


def _inputs(steps: Steps, q: Any, k: Any, v: Any, walk: Walk, given: Any) -> list[Any]:
  """Returns the arrays of both backward kernels with their blocks."""
  size, values = q.shape[3], v.shape[3]
  return [
    *zip(walk.masks, steps.spans(), strict=True),
    (q, steps.query_rows(size)), (k, steps.key_rows(size)), (v, steps.key_rows(values)),
    (given[0], steps.query_rows(values)),
    (given[1], steps.query_numbers()), (given[2], steps.query_numbers()),
  ]  # fmt: skip


def _query_gradient_kernel(
  scale: float, low: Any, high: Any, first: Any, last: Any, slot: Any, q: Any, k: Any, v: Any,
  dout: Any, lse: Any, pull: Any, dq: Any, dq_Hl: Any,
) -> None:  # fmt: skip
  b, i, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)

  @pl.when(t == 0)
  def _() -> None:
    dq_Hl[...] = jnp.zeros_like(dq_Hl)

  @pl.when(t <= high[b, i] - low[b, i])
  def _() -> None:
    _, dz_sl = _pulled(k, q, v, dout, lse, pull, mask(first, last, slot), scale)
    dq_Hl[...] += dot("sh,sl", k[...], dz_sl)

  @pl.when(t == pl.num_programs(3) - 1)
  def _() -> None:
    dq[...] = dq_Hl[...].T.astype(dq.dtype)


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
    _inputs(steps, q, k, v, walk, given),
    [
      (jax.ShapeDtypeStruct(k.shape, k.dtype), steps.key_rows(size)),
      (jax.ShapeDtypeStruct(v.shape, v.dtype), steps.key_rows(values)),
    ],
    [(tiles.keys, size), (tiles.keys, values)],
    tiles.interpret,
  )


def _key_gradient_kernel(
  scale: float, blocks: int, low: Any, high: Any, first: Any, last: Any, slot: Any, q: Any, k: Any,
  v: Any, dout: Any, lse: Any, pull: Any, dk: Any, dv: Any, dk_sH: Any, dv_sP: Any,
) -> None:  # fmt: skip
  b, j, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)

  @pl.when(t == 0)
  def _() -> None:
    dk_sH[...] = jnp.zeros_like(dk_sH)
    dv_sP[...] = jnp.zeros_like(dv_sP)

  @pl.when(jax.lax.rem(t, blocks) <= high[b, j] - low[b, j])
  def _() -> None:
    share_sl, dz_sl = _pulled(k, q, v, dout, lse, pull, mask(first, last, slot), scale)
    dk_sH[...] += dot("sl,lh", dz_sl, q[...])
    dv_sP[...] += dot("sl,lp", share_sl.astype(v.dtype), dout[...])

  @pl.when(t == pl.num_programs(3) - 1)
  def _() -> None:
    dk[...] = dk_sH[...].astype(dk.dtype)
    dv[...] = dv_sP[...].astype(dv.dtype)
