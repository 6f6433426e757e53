"""What every back end of softmax attention owes, by a loop in float64; and what it sees of keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.attention import BACKENDS, NO_SLOT, NOTHING, Sight, mosaic_tpu
from jaxmoe.ops.attention.blocks import Blocks, blocks
from jaxmoe.ops.attention.tpu_walk import Tiles
from tests.ops.attention import attention_oracle

SCALE, L = 0.3, 11
# Blocks of 4, so that rows make several, the last ones not full.
FORMS = {
  **{name: backend for name, backend in BACKENDS.items() if not name.startswith("mosaic")},
  "mosaic_tpu of 4": functools.partial(mosaic_tpu, tiles=Tiles(4, 4, interpret=True)),
  "blocks of 4": functools.partial(blocks, cut=Blocks(4, 4, 1)),
}
form = pytest.mark.parametrize("form", FORMS)
SLOT = np.arange(L)


def spans(first, last=SLOT, hidden=()):
  """Returns spans of two rows: of these first and last slots, and those of one whole document."""
  slot = np.where(np.isin(SLOT, hidden), NO_SLOT, SLOT)
  first = np.stack([np.broadcast_to(first, (L,)), np.zeros(L, int)])
  return first, np.stack([np.broadcast_to(last, (L,)), SLOT]), np.stack([slot, slot])


_nothing = np.isin(SLOT, [0, 5, 10])
SIGHTS = {
  "causal": spans(0),
  "documents that end inside a block": spans(np.array([0] * 3 + [3] * 7 + [10])),
  "documents of one token": spans(SLOT),
  "a window of one": spans(SLOT),
  "a window of three": spans(np.maximum(SLOT - 2, 0)),
  "a window above the length": spans(np.maximum(SLOT - 99, 0)),
  "all": spans(0, L - 1),
  "rows without a key, keys without a row": spans(
    np.where(_nothing, NOTHING[0], 0), np.where(_nothing, NOTHING[1], SLOT), hidden=(4, 6, 7)
  ),
  "nothing": spans(NOTHING[0], NOTHING[1], hidden=SLOT),
}


def draw(shape=(2, L, L), heads=(4, 2), sizes=(8, 8), seed=0):
  """Returns q, k, v, float64, for (B, L, S), (N, K) and (H, P)."""
  rng = np.random.default_rng(seed)
  (batch, length, slots), (queries, keys), (size, values) = shape, heads, sizes
  q = rng.normal(size=(batch, length, queries, size)) * 3
  k = rng.normal(size=(batch, slots, keys, size)) * 3
  return q, k, rng.normal(size=(batch, slots, keys, values)) * 3


def cast(arrays, dtype=jnp.float32):
  return tuple(jnp.asarray(x, dtype) for x in arrays)


def sight_of(spans, sink=None):
  sink = None if sink is None else jnp.asarray(sink, jnp.float32)
  return Sight(*(jnp.asarray(x, jnp.int32) for x in spans), SCALE, sink)


@functools.partial(jax.jit, static_argnums=0)
def graded(form, arrays, sight, cotangents):
  """Returns what a form finds, and the gradients of its products with the cotangents."""

  def loss(arrays, sink_N):
    part = FORMS[form](*arrays, dataclasses.replace(sight, sink_N=sink_N))
    lse = jnp.where(jnp.isfinite(part.lse_BLN), part.lse_BLN, 0.0)
    return jnp.sum(part.out_BLNP * cotangents[0]) + jnp.sum(lse * cotangents[1]), part

  (_, part), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays, sight.sink_N)
  return part, (*grads[0], grads[1])


def check(form, arrays, spans, sink=None, seed=9):
  """Compares values and all gradients with the loop."""
  rng = np.random.default_rng(seed)
  shape = arrays[0].shape[:3]
  cotangents = rng.normal(size=(*shape, arrays[2].shape[-1])), rng.normal(size=shape)
  sight = sight_of(spans, sink)
  part, grads = graded(form, cast(arrays), sight, cast(cotangents))
  mask = np.asarray(sight.dense())
  out, lse = attention_oracle.find(arrays, mask, SCALE, sink)
  np.testing.assert_allclose(part.out_BLNP, out, rtol=1e-5, atol=2e-5)
  np.testing.assert_allclose(part.lse_BLN, lse, rtol=1e-5, atol=1e-5)
  right = attention_oracle.pull_back(arrays, mask, SCALE, cotangents, sink)
  for name, one, other in zip(("q", "k", "v", "sink"), grads, right, strict=True):
    if one is not None:
      # Sums over keys or queries in float32; scores reach 30, where e^x has lost some of its bits.
      np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4, err_msg=name)


@form
@pytest.mark.parametrize("name", SIGHTS)
def test_values_and_gradients_are_those_of_the_float64_loop(form, name):
  check(form, draw(), SIGHTS[name])


@pytest.mark.parametrize("form", ["reference", "blocks", "blocks of 4", "mosaic_tpu of 4"])
@pytest.mark.parametrize("name", ["documents that end inside a block", "nothing"])
def test_a_sink_takes_its_share_and_has_its_gradient(form, name):
  check(form, draw(), SIGHTS[name], np.array([-40.0, 0.5, 2.0, 60.0]))


@form
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_any_number_of_query_heads_shares_a_key_head(form, kv_heads):
  check(form, draw(heads=(8, kv_heads)), SIGHTS["documents that end inside a block"])


@pytest.mark.parametrize("form", ["reference", "blocks", "blocks of 4"])
@pytest.mark.parametrize("sizes", [(6, 10), (12, 5)])
def test_values_may_be_of_another_size_than_keys(form, sizes):
  check(form, draw(heads=(8, 1), sizes=sizes), SIGHTS["documents that end inside a block"])


@form
@pytest.mark.parametrize("length", [1, 3])
def test_a_few_queries_see_a_long_cache_whose_last_slots_are_empty(form, length):
  slots, found = 29, (23, 6)
  slot = np.stack([np.where(np.arange(slots) < of, np.arange(slots), NO_SLOT) for of in found])
  last = np.stack([of - length + np.arange(length) for of in found])
  check(form, draw((2, length, slots)), (np.maximum(last - 9, 0), last, slot))


@form
def test_keys_in_another_order_are_known_by_their_slots(form):
  first, last, slot = SIGHTS["documents that end inside a block"]
  order = np.random.default_rng(0).permutation(L)
  check(form, draw(), (first, last, slot[:, order]))


@form
def test_bfloat16_has_a_small_error_and_parts_in_float32(form):
  arrays, sight = draw(), sight_of(SIGHTS["causal"])
  part = FORMS[form](*cast(arrays, jnp.bfloat16), sight)
  assert part.out_BLNP.dtype == part.lse_BLN.dtype == jnp.float32
  out, lse = attention_oracle.find(arrays, np.asarray(sight.dense()), SCALE)
  assert np.median(np.abs(part.out_BLNP - out)) < 2e-2
  assert np.median(np.abs(part.lse_BLN - lse)) < 2e-2


@form
@pytest.mark.parametrize("content", [0.0, 1e30, -1e37])
def test_a_hidden_key_changes_nothing_bit_for_bit(form, content):
  q, k, v = cast(draw())
  sight = sight_of(SIGHTS["rows without a key, keys without a row"])
  cotangents = jnp.ones(q.shape), jnp.ones(q.shape[:3])
  plain = graded(form, (q, k, v), sight, cotangents)
  k, v = k.at[:, 6].set(content), v.at[:, 6].set(content)
  dirty = graded(form, (q, k, v), sight, cotangents)
  jax.tree.map(np.testing.assert_array_equal, plain, dirty)
  np.testing.assert_array_equal(plain[0].out_BLNP[0, 5], 0.0)
  np.testing.assert_array_equal(plain[1][0][0, 5], 0.0)


def test_heads_that_do_not_divide_and_masks_that_are_no_span_are_refused():
  sight = sight_of(SIGHTS["causal"])
  for name, backend in FORMS.items():
    with pytest.raises(ValueError, match="divide"):
      backend(*cast(draw(heads=(3, 2))), sight)
    if "blocks" in name:
      with pytest.raises(ValueError, match="no span"):
        backend(*cast(draw()), Sight.of_mask(sight.dense(), SCALE))


@pytest.mark.parametrize("form", ["reference", "xla"])
def test_any_mask_is_seen_where_scores_are_held(form):
  arrays, mask = draw(), np.random.default_rng(2).random((2, L, L)) < 0.5
  part = FORMS[form](*cast(arrays), Sight.of_mask(jnp.asarray(mask), SCALE))
  out, lse = attention_oracle.find(arrays, mask, SCALE)
  np.testing.assert_allclose(part.out_BLNP, out, rtol=1e-5, atol=2e-5)
  np.testing.assert_allclose(part.lse_BLN, lse, rtol=1e-5, atol=1e-5)
