"""Linear attention over signs of queries and keys (ShiftAddViT, You et al. 2023, arXiv:2306.06446).

Signs of H entries agree in (H + b(q) b(k)) / 2 places; a key's share is its agreements over those
of all keys seen, which is linear in b(k) and so computed in the order q (K^T V): sums over keys are
kept and no scores. Products with signs are additions; on accelerators they cost what products do,
and what is gained is the order and a state whose size does not depend on the length.

Departures: in the paper a token sees all others, here its document so far, by running sums over
chunks. Its released code has codes 0 and 1 about the mean, and divides by the length of what is
found. Here shares sum to 1, which needs products that are not negative: EcoFormer (Liu et al. 2022,
arXiv:2209.09004) as released adds the number of bits and one to a product of codes, here it is H.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 64


def binarize(x: jax.Array) -> jax.Array:
  """Returns float32 signs, 1 for 0; the gradient passes straight where |x| <= 1.

  Binarized Neural Networks, arXiv:1602.02830: beyond that a sign is sure and x would only grow.
  """
  x = x.astype(jnp.float32)
  through = jnp.clip(x, -1, 1)
  return through + jax.lax.stop_gradient(jnp.where(x < 0, -1.0, 1.0) - through)


def binary_linear(
  q_BLNH: jax.Array,
  k_BLKH: jax.Array,
  v_BLKH: jax.Array,
  segment_BL: jax.Array,
  state: tuple[jax.Array, jax.Array],
  chunk: int = CHUNK,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns (B, L, N, H) in q's dtype and the state after these tokens.

  Args:
    q_BLNH: Queries; query head n reads key head n // (N // K).
    k_BLKH: Keys of the same tokens.
    v_BLKH: Values.
    segment_BL: The document of each token, contiguous in time; 0 is padding.
    state: `empty_state`, or that of an earlier call: float32 sums over the keys so far of each
      row's last document, and that document.
    chunk: Tokens whose scores among each other exist at a time.
  """
  batch, length, heads, size = q_BLNH.shape
  kv_heads = k_BLKH.shape[2]
  width = min(chunk, length)
  # One more entry makes agreements of products, and sums of shares of values.
  q = _extended(binarize(q_BLNH), float(size))
  k, v = _extended(binarize(k_BLKH), 1.0), _extended(v_BLKH.astype(jnp.float32), 1.0)
  q = q.reshape(batch, length, kv_heads, heads // kv_heads, size + 1)

  def step(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
    (sums_BKPV, last_B), (q, k, v, segment_Bl) = state, inputs
    order = jnp.arange(width)
    mask = (segment_Bl[:, :, None] == segment_Bl[:, None, :]) & (segment_Bl > 0)[:, :, None]
    mask = mask & (order[:, None] >= order[None, :])[None]
    agree = jnp.where(mask[:, None, None], jnp.einsum("blkgp,bskp->bkgls", q, k), 0.0)
    here = jnp.einsum("bkgls,bskv->blkgv", agree, v)
    goes_on = (segment_Bl == last_B[:, None]) & (segment_Bl > 0)
    before = jnp.einsum("blkgp,bkpv->blkgv", q, sums_BKPV)
    total = here + jnp.where(goes_on[:, :, None, None, None], before, 0.0)
    return _advance(state, k, v, segment_Bl), total

  more = -length % width
  chunks = jax.tree.map(lambda x: _chunks(x, more, width), (q, k, v, segment_BL))
  state, total = jax.lax.scan(step, state, chunks)
  total = jnp.moveaxis(total, 0, 1).reshape(batch, -1, heads, size + 1)[:, :length]
  norm = total[..., -1:]
  out = total[..., :-1] / jnp.where(norm > 0, norm, 1.0)
  return out.astype(q_BLNH.dtype), state


def empty_state(batch: int, kv_heads: int, size: int) -> tuple[jax.Array, jax.Array]:
  """Returns the state before any token."""
  sums = jnp.zeros((batch, kv_heads, size + 1, size + 1), jnp.float32)
  return sums, jnp.zeros(batch, jnp.int32)


def state_after(
  state: tuple[jax.Array, jax.Array], k_BLKH: jax.Array, v_BLKH: jax.Array, segment_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the state after tokens, as `binary_linear` does."""
  k, v = _extended(binarize(k_BLKH), 1.0), _extended(v_BLKH.astype(jnp.float32), 1.0)
  return _advance(state, k, v, segment_BL)


def join_states(
  state: tuple[jax.Array, jax.Array], after: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Returns the state after later tokens too, of which `after` is the state of them alone."""
  (sums_BKPV, last_B), (more_BKPV, new_B) = state, after
  same_B, some_B = new_B == last_B, new_B > 0
  kept_BKPV = jnp.where((same_B | ~some_B)[:, None, None, None], sums_BKPV, 0.0)
  return kept_BKPV + more_BKPV, jnp.where(some_B, new_B, last_B)


def _advance(
  state: tuple[jax.Array, jax.Array], k: jax.Array, v: jax.Array, segment_Bl: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the sums of the document that is the last after these tokens."""
  sums_BKPV, last_B = state
  at_B = jnp.max(jnp.where(segment_Bl > 0, jnp.arange(segment_Bl.shape[1])[None], -1), axis=1)
  found_B = jnp.take_along_axis(segment_Bl, jnp.maximum(at_B, 0)[:, None], axis=1)[:, 0]
  new_B = jnp.where(at_B >= 0, found_B, last_B)
  mine = (segment_Bl == new_B[:, None]) & (segment_Bl > 0)
  added = jnp.einsum("bskp,bskv->bkpv", jnp.where(mine[:, :, None, None], k, 0.0), v)
  kept = jnp.where((new_B == last_B)[:, None, None, None], sums_BKPV, 0.0)
  return kept + added, new_B


def _extended(x: jax.Array, value: float) -> jax.Array:
  return jnp.pad(x, [(0, 0)] * 3 + [(0, 1)], constant_values=value)


def _chunks(x: jax.Array, more: int, width: int) -> jax.Array:
  """Returns (chunks, B, width, ...): dim 1 padded by `more` and cut."""
  x = jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(x.shape[0], -1, width, *x.shape[2:]), 1, 0)
