"""Softmax attention block by block, for any platform: no (L, S) array is ever held.

FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2) in plain JAX. A block of queries
visits the blocks of keys that some query of it sees and keeps a running maximum; what is left for
the backward pass is the output and the log-sum-exp. Query heads that share a key head are rows of
one product. A few key heads go at a time, so that a block's scores stay in a core's cache.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.core.backends import Need
from jaxmoe.ops.attention.merge import AttentionPart, join_sink
from jaxmoe.ops.attention.seen_blocks import cut_spans, seen_blocks, visits
from jaxmoe.ops.attention.sight import Sight, sees

_SHORT, _LONG = 64, 128
_LONG_ROW = 512  # where there are more keys blocks are long
_SCORES = 32_768  # of all heads that go at a time
_LEAST_KEYS, _LEAST_QUERIES, _LEAST_KEYS_ELSEWHERE = 128, 16, 8192
_LOWEST = jnp.finfo(jnp.float32).min


class Blocks(NamedTuple):
  """How rows are cut: queries and keys of a block, and key heads that go at a time."""

  queries: int
  keys: int
  heads: int

  @classmethod
  def of(cls, queries: tuple[int, ...], keys: tuple[int, ...]) -> Blocks:
    """Returns blocks that suit a core's cache, for arrays (B, L, N, H) and (B, S, K, H)."""
    (length, heads), (slots, kv_heads) = queries[1:3], keys[1:3]
    size = _LONG if slots > _LONG_ROW else _SHORT
    group = heads // kv_heads
    rows, columns = min(length, max(1, size // group)), min(slots, size)
    most = max(1, _SCORES // (rows * group * columns))
    at_a_time = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= most)
    return cls(rows, columns, at_a_time)


def for_long_rows(need: Need) -> str | None:
  """Meant for many queries and keys: on a CPU from where it is faster, elsewhere for its memory."""
  least = _LEAST_KEYS if need.devices.platform == "cpu" else _LEAST_KEYS_ELSEWHERE
  if need.sizes["S"] < least:
    return f"is meant for {least} keys and more, there are {need.sizes['S']}"
  if need.sizes["L"] < _LEAST_QUERIES:
    return f"is meant for {_LEAST_QUERIES} queries and more, there are {need.sizes['L']}"
  return None


def blocks(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKP: jax.Array, sight: Sight, cut: Blocks | None = None
) -> AttentionPart:
  """Returns what `reference` does, up to rounding; of masks that are spans."""
  sight.check(q_BLNH, k_BSKH, v_BSKP)
  cut = cut or Blocks.of(q_BLNH.shape, k_BSKH.shape)
  part = AttentionPart(*_attend(q_BLNH, k_BSKH, v_BSKP, sight.spans, sight.scale, cut))
  return join_sink(part, sight.sink_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKP: jax.Array, spans: Any, scale: float, cut: Blocks
) -> tuple[jax.Array, jax.Array]:
  return _forward(q_BLNH, k_BSKH, v_BSKP, spans, scale, cut)[0]


def _forward(q_BLNH: Any, k_BSKH: Any, v_BSKP: Any, spans: Any, scale: float, cut: Blocks) -> Any:
  q, k, v = _cut_rows(q_BLNH, cut, k_BSKH.shape[2]), _cut_keys(k_BSKH, cut), _cut_keys(v_BSKP, cut)
  lists = _Lists.of(spans, cut, q_BLNH.shape[2] // k_BSKH.shape[2], k_BSKH.shape[2] // cut.heads)

  def of_heads(inputs: Any) -> Any:
    n, q, k, v = inputs
    of_queries = lambda i: _find(q[i], k, v, lists.at(n, i), scale)  # noqa: E731
    return jax.lax.map(of_queries, jnp.arange(q.shape[0]))

  out, lse = jax.lax.map(of_heads, (jnp.arange(q.shape[0]), q, k, v))
  shape = q_BLNH.shape[:3]
  out_BLNP = _join_rows(out, cut, shape)
  lse_BLN = _join_rows(lse[..., None], cut, shape)[..., 0]
  kept_BLNP = out_BLNP.astype(q_BLNH.dtype)
  return (out_BLNP, lse_BLN), (q_BLNH, k_BSKH, v_BSKP, spans, kept_BLNP, lse_BLN)


def _backward(scale: float, cut: Blocks, saved: Any, cotangents: Any) -> Any:
  q_BLNH, k_BSKH, v_BSKP, spans, out_BLNP, lse_BLN = saved
  dout_BLNP, dlse_BLN = cotangents
  kv_heads = k_BSKH.shape[2]
  delta_BLN = jnp.sum(dout_BLNP * out_BLNP.astype(jnp.float32), axis=-1) - dlse_BLN
  of_rows = (q_BLNH, dout_BLNP.astype(v_BSKP.dtype), lse_BLN[..., None], delta_BLN[..., None])
  rows = tuple(_cut_rows(x, cut, kv_heads) for x in of_rows)
  k, v = _cut_keys(k_BSKH, cut), _cut_keys(v_BSKP, cut)
  lists = _Lists.of(spans, cut, q_BLNH.shape[2] // kv_heads, kv_heads // cut.heads)

  def of_heads(inputs: Any) -> Any:
    n, rows, k, v = inputs

    def of_queries(sums: Any, inputs: Any) -> Any:
      i, rows = inputs
      return _pull_back(rows, k, v, lists.at(n, i), sums, scale)

    none = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(of_queries, none, (jnp.arange(rows[0].shape[0]), rows))
    return dq, dk, dv

  dq, dk, dv = jax.lax.map(of_heads, (jnp.arange(k.shape[0]), rows, k, v))
  dq_BLNH = _join_rows(dq, cut, q_BLNH.shape[:3]).astype(q_BLNH.dtype)
  return dq_BLNH, _join_keys(dk, cut, k_BSKH), _join_keys(dv, cut, v_BSKP), None


_attend.defvjp(_forward, _backward)


class _Seen(NamedTuple):
  """What the queries of a block see: its list of blocks, and the spans of its rows."""

  order_j: jax.Array
  number: jax.Array
  first_r: jax.Array
  last_r: jax.Array
  slot_js: jax.Array

  def mask(self, j: jax.Array) -> jax.Array:
    """Returns (1, rows, keys) bool, which row sees which key of block j."""
    return sees(self.first_r, self.last_r, self.slot_js[j])[None]


class _Lists(NamedTuple):
  """What every block of queries sees, of `parts` parts of the heads of each row of a batch."""

  order_Bij: jax.Array
  count_Bi: jax.Array
  first_Bir: jax.Array
  last_Bir: jax.Array
  slot_Bjs: jax.Array
  parts: int

  @classmethod
  def of(cls, spans: Any, cut: Blocks, group: int, parts: int) -> _Lists:
    """Returns lists for heads in groups of so many that share a key head."""
    first_Bil, last_Bil, slot_Bjs = cut_spans(spans, cut.queries, cut.keys)
    order_Bij, count_Bi = visits(seen_blocks(first_Bil, last_Bil, slot_Bjs))
    first_Bir, last_Bir = (jnp.tile(x, (1, 1, group)) for x in (first_Bil, last_Bil))
    return cls(order_Bij, count_Bi, first_Bir, last_Bir, slot_Bjs, parts)

  def at(self, n: jax.Array, i: jax.Array) -> _Seen:
    """Returns what block i of the n-th part of heads sees."""
    b = n // self.parts
    return _Seen(
      self.order_Bij[b, i], self.count_Bi[b, i], self.first_Bir[b, i], self.last_Bir[b, i],
      self.slot_Bjs[b],
    )  # fmt: skip


def _find(q_Krh: jax.Array, k: jax.Array, v: jax.Array, seen: _Seen, scale: float) -> Any:
  """Returns what a block of queries finds, (heads, rows, P), and the log-sum-exp of its scores."""

  def step(at: jax.Array, carry: Any) -> Any:
    out, peak, total = carry
    j = seen.order_j[at]
    mask = seen.mask(j)
    score = jnp.where(mask, scale * _product("krh,ksh->krs", q_Krh, k[j]), _LOWEST)
    new_peak = jnp.maximum(peak, jnp.max(score, axis=-1))
    prob = jnp.where(mask, jnp.exp(score - new_peak[..., None]), 0.0)
    kept = jnp.exp(peak - new_peak)
    found = _product("krs,ksp->krp", prob.astype(v.dtype), v[j])
    return kept[..., None] * out + found, new_peak, kept * total + jnp.sum(prob, axis=-1)

  none = jnp.zeros(q_Krh.shape[:2], jnp.float32)
  out = jnp.zeros((*q_Krh.shape[:2], v.shape[-1]), jnp.float32)
  carry = (out, none + _LOWEST, none)
  out, peak, total = jax.lax.fori_loop(0, seen.number, step, carry)
  some = total > 0
  total = jnp.where(some, total, 1.0)
  return out / total[..., None], jnp.where(some, peak + jnp.log(total), -jnp.inf)


def _pull_back(rows: Any, k: jax.Array, v: jax.Array, seen: _Seen, sums: Any, scale: float) -> Any:
  """Returns the sums of gradients of keys and values with those of a block of queries, and its own.

  With p = e^(score - lse) and delta = dout . out - dlse: dscore = p (dout . v - delta).
  """
  q_Krh, dout_Krp, lse_Kr1, delta_Kr1 = rows

  def step(at: jax.Array, carry: Any) -> Any:
    dq, dk, dv = carry
    j = seen.order_j[at]
    score = scale * _product("krh,ksh->krs", q_Krh, k[j])
    prob = jnp.where(seen.mask(j), jnp.exp(score - lse_Kr1), 0.0)
    dprob = _product("krp,ksp->krs", dout_Krp, v[j])
    dscore = (scale * prob * (dprob - delta_Kr1)).astype(k.dtype)
    dq = dq + _product("krs,ksh->krh", dscore, k[j])
    dk = dk.at[j].add(_product("krs,krh->ksh", dscore, q_Krh))
    dv = dv.at[j].add(_product("krs,krp->ksp", prob.astype(v.dtype), dout_Krp))
    return dq, dk, dv

  none = jnp.zeros(q_Krh.shape, jnp.float32)
  dq, *sums = jax.lax.fori_loop(0, seen.number, step, (none, *sums))
  return tuple(sums), dq


def _product(spec: str, one: jax.Array, other: jax.Array) -> jax.Array:
  return jnp.einsum(spec, one, other, preferred_element_type=jnp.float32)


def _cut_rows(x_BLNH: jax.Array, cut: Blocks, kv_heads: int) -> jax.Array:
  """Returns (n, i, heads, rows, H), rows the queries of a block by head of a group."""
  batch, length, heads, size = x_BLNH.shape
  x = jnp.pad(x_BLNH, [(0, 0), (0, -length % cut.queries), (0, 0), (0, 0)])
  group = heads // kv_heads
  x = x.reshape(batch, -1, cut.queries, kv_heads // cut.heads, cut.heads, group, size)
  x = x.transpose(0, 3, 1, 4, 5, 2, 6)
  return x.reshape(-1, *x.shape[2:4], group * cut.queries, size)


def _join_rows(x: jax.Array, cut: Blocks, shape: tuple[int, ...]) -> jax.Array:
  """Returns blocks of rows as (B, L, N, P)."""
  batch, length, heads = shape
  x = x.reshape(batch, -1, *x.shape[1:3], x.shape[3] // cut.queries, cut.queries, x.shape[-1])
  x = x.transpose(0, 2, 5, 1, 3, 4, 6)
  return x.reshape(batch, -1, heads, x.shape[-1])[:, :length]


def _cut_keys(x_BSKH: jax.Array, cut: Blocks) -> jax.Array:
  """Returns (n, j, heads, keys, H)."""
  batch, slots, kv_heads, size = x_BSKH.shape
  x = jnp.pad(x_BSKH, [(0, 0), (0, -slots % cut.keys), (0, 0), (0, 0)])
  x = x.reshape(batch, -1, cut.keys, kv_heads // cut.heads, cut.heads, size)
  x = x.transpose(0, 3, 1, 4, 2, 5)
  return x.reshape(-1, *x.shape[2:])


def _join_keys(x: jax.Array, cut: Blocks, like_BSKH: jax.Array) -> jax.Array:
  """Returns blocks of keys as (B, S, K, H), in the dtype of `like_BSKH`."""
  batch, slots, kv_heads, size = like_BSKH.shape
  x = x.reshape(batch, -1, *x.shape[1:]).transpose(0, 2, 4, 1, 3, 5)
  return x.reshape(batch, -1, kv_heads, size)[:, :slots].astype(like_BSKH.dtype)
