import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.attention import NO_SLOT, NOTHING, Sight
from jaxmoe.ops.attention.tpu_walk import Tiles
from jaxmoe.ops.stick_breaking import BACKENDS, blocks, merge, mosaic_tpu

SCALE, B, L, S, H = 0.3, 2, 11, 13, 4
# Blocks of 4, so that 11 queries and 13 keys make several, the last ones not full.
FORMS = {
  "reference": BACKENDS["reference"],
  "blocks of 4": functools.partial(blocks, block=4),
  "mosaic_tpu of 4": functools.partial(mosaic_tpu, tiles=Tiles(4, 4, interpret=True)),
}
HERE = {name: backend for name, backend in BACKENDS.items() if not name.startswith("mosaic")}
form = pytest.mark.parametrize("attention", FORMS.values(), ids=FORMS.keys())


def oracle(q, k, v, sight):
  """The product of ModuleFormer's section 2.2 in float64, one query of one head at a time."""
  out, mask = np.zeros((*q.shape[:3], v.shape[-1])), np.asarray(sight.dense())
  group = q.shape[2] // k.shape[2]
  for b, query, n in np.ndindex(*q.shape[:3]):
    left = 1.0
    for key in np.flatnonzero(mask[b, query])[::-1]:
      beta = 1 / (1 + np.exp(-SCALE * q[b, query, n] @ k[b, key, n // group]))
      out[b, query, n] += beta * left * v[b, key, n // group]
      left *= 1 - beta
  return out


def sight_of(first, last, slot):
  return Sight(*(jnp.asarray(x, jnp.int32) for x in (first, last, slot)), SCALE)


def causal():
  """Returns the sight of the last L queries of S."""
  last = np.broadcast_to(np.arange(L) + S - L, (B, L))
  return sight_of(0 * last, last, np.broadcast_to(np.arange(S), (B, S)))


def inputs(kv_heads=2, seed=0, values=H):
  """Returns q, k, v and spans up to the own slot; (0, 2) sees nothing, nobody sees key 6."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(B, L, 4, H)) * 3
  k, v = (rng.normal(size=(B, S, kv_heads, size)) * 3 for size in (H, values))
  last = np.broadcast_to(np.arange(L) + S - L, (B, L)).copy()
  first = np.maximum(last - rng.integers(0, S, (B, L)), 0)
  first[0, 2], last[0, 2] = NOTHING
  slot = np.broadcast_to(np.arange(S), (B, S)).copy()
  slot[:, [6, 8]] = NO_SLOT
  return q, k, v, sight_of(first, last, slot)


def cast(q, k, v, sight, dtype=jnp.float32):
  return *(jnp.asarray(x, dtype) for x in (q, k, v)), sight


def graded(attention):
  """Returns a compiled function to the output and the gradients of a sum of its sines."""

  def loss(q, k, v, sight):
    out = attention(q, k, v, sight).out_BLNP
    return jnp.sum(jnp.sin(out)), out

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@form
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_stick_breaking_equals_the_float64_product_loop(attention, kv_heads):
  arrays = inputs(kv_heads, values=H + kv_heads - 2)
  out = jax.jit(attention)(*cast(*arrays)).out_BLNP
  np.testing.assert_allclose(out, oracle(*arrays), rtol=1e-5, atol=1e-5)


@form
def test_gradients_equal_the_loop_in_finite_differences(attention):
  arrays = inputs(seed=3)
  rng = np.random.default_rng(4)
  directions = [rng.normal(size=x.shape) for x in arrays[:3]]
  _, grads = graded(attention)(*cast(*arrays))
  step = 1e-5
  for index, (grad, direction) in enumerate(zip(grads, directions, strict=True)):
    moved = [list(arrays[:3]), list(arrays[:3])]
    moved[0][index] = arrays[index] + step * direction
    moved[1][index] = arrays[index] - step * direction
    above, below = (np.sin(oracle(*x, arrays[3])).sum() for x in moved)
    # Finite differences in float64 are good to 1e-8; the rest is float32.
    right = (above - below) / (2 * step)
    np.testing.assert_allclose(np.sum(grad * direction), right, rtol=1e-4, atol=1e-4)


def test_the_blocks_have_the_gradients_of_the_reference_entry_by_entry():
  arrays = cast(*inputs(seed=5))
  _, right = graded(FORMS["reference"])(*arrays)
  for name, attention in {**FORMS, **HERE}.items():
    _, found = graded(attention)(*arrays)
    for one, other in zip(found, right, strict=True):
      # Sums over keys in another order.
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5, err_msg=name)


@form
def test_bfloat16_has_its_type_and_a_small_error_also_in_gradients(attention):
  arrays = inputs()
  (_, out), grads = graded(attention)(*cast(*arrays, dtype=jnp.bfloat16))
  assert out.dtype == jnp.float32 and all(grad.dtype == jnp.bfloat16 for grad in grads)
  assert np.median(np.abs(np.asarray(out, np.float64) - oracle(*arrays))) < 2e-2
  (_, _), right = graded(attention)(*cast(*arrays))
  for one, other in zip(grads, right, strict=True):
    assert np.median(np.abs(np.asarray(one, np.float32) - np.asarray(other))) < 2e-2


@form
def test_shares_sum_to_at_most_one_and_the_last_key_is_served_first(attention):
  q, k, _, sight = cast(*inputs(4))
  found, left = attention(q, k, jnp.ones_like(k), sight)
  total = np.asarray(found)[..., 0]
  np.testing.assert_allclose(np.exp(left), 1 - total, atol=1e-6)
  assert (total <= 1 + 1e-6).all() and (total[1] > 0).all()
  assert (total < 0.95).any(), "what no key takes stays unassigned"
  # A last key that takes all hides those before it; a softmax would share with equal ones.
  same = jnp.ones_like(k) * 20
  v = jnp.broadcast_to(jnp.arange(S, dtype=jnp.float32)[None, :, None, None], k.shape)
  out = attention(jnp.ones_like(q) * 20, same, v, causal()).out_BLNP
  np.testing.assert_array_equal(out[0, :, 0, 0], np.arange(L) + S - L)


@form
def test_far_keys_keep_their_digits_where_the_sum_of_logarithms_is_large(attention):
  # Key 0 leaves the last key's share to rounding if sums were made from the front and subtracted.
  k = np.zeros((1, 200, 1, H))
  k[:, :100] = 300.0
  q, v = np.ones((1, 1, 1, H)), np.random.default_rng(0).normal(size=k.shape)
  sight = sight_of([[0]], [[199]], np.arange(200)[None])
  out = attention(*cast(q, k, v, sight)).out_BLNP
  np.testing.assert_allclose(out, oracle(q, k, v, sight), rtol=1e-5, atol=1e-7)


@form
@pytest.mark.parametrize("content", [0.0, 1e30, -1e37])
def test_a_hidden_key_takes_nothing_of_the_stick_bit_for_bit(attention, content):
  q, k, v, sight = cast(*inputs())
  run = graded(attention)
  plain = run(q, k, v, sight)
  dirty = run(q, k.at[:, 6].set(content), v.at[:, 6].set(content), sight)
  jax.tree.map(np.testing.assert_array_equal, plain, dirty)
  # Nor is its place seen: without it the rest is as it was.
  cut = lambda x: jnp.delete(x, 6, axis=1)  # noqa: E731
  seen = dataclasses.replace(sight, slot_BS=cut(sight.slot_BS))
  without = attention(q, cut(k), cut(v), seen).out_BLNP
  np.testing.assert_allclose(plain[0][1], without, rtol=1e-6, atol=1e-6)


@form
def test_a_query_that_sees_no_key_gives_zero_and_gets_no_gradient(attention):
  q, k, v, sight = cast(*inputs())
  (_, out), grads = graded(attention)(q, k, v, sight)
  np.testing.assert_array_equal(out[0, 2], 0.0)
  np.testing.assert_array_equal(grads[0][0, 2], 0.0)
  np.testing.assert_array_equal(grads[1][:, 6], 0.0)
  assert np.all(np.any(grads[0][1] != 0, axis=-1))


@form
def test_a_later_key_changes_no_earlier_query_bit_for_bit(attention):
  q, k, v, _ = cast(*inputs())
  run = jax.jit(lambda q, k, v: attention(q, k, v, causal()).out_BLNP)
  before = np.asarray(run(q, k, v))
  for at in range(S - L, S):
    after = np.asarray(run(q, k.at[:, at].add(1.0), v.at[:, at].add(1.0)))
    first = at - (S - L)
    np.testing.assert_array_equal(after[:, :first], before[:, :first])
    assert (after[:, first] != before[:, first]).any(axis=(1, 2)).all()


def test_the_blocks_hold_no_array_over_all_queries_and_keys():
  long, shape = 512, (1, 512, 4, 8)
  spans = [jax.ShapeDtypeStruct((1, long), jnp.int32)] * 3
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3 + [Sight(*spans, SCALE)]
  temporary = {
    name: graded(BACKENDS[name]).lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    for name in HERE
  }
  scores = 4 * long * long * 4
  assert temporary["reference"] > scores
  assert temporary["blocks"] < scores / 2


@form
def test_parts_of_the_stick_merge_in_any_grouping_nearer_keys_first(attention):
  q, k, v, sight = cast(*inputs())
  cuts = [slice(9, S), slice(4, 9), slice(0, 4)]

  def parts(q, k, v):
    return [
      attention(
        q, k[:, cut], v[:, cut], dataclasses.replace(sight, slot_BS=sight.slot_BS[:, cut])
      )
      for cut in cuts
    ]

  def loss(one_way, q, k, v):
    near, middle, far = parts(q, k, v)
    part = merge(merge(near, middle), far) if one_way else merge(near, merge(middle, far))
    return jnp.sum(jnp.sin(part.out_BLNP) + part.left_BLN[..., None]), part

  def whole(q, k, v):
    part = attention(q, k, v, sight)
    return jnp.sum(jnp.sin(part.out_BLNP) + part.left_BLN[..., None]), part

  run = lambda loss: jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)  # noqa: E731
  right = run(whole)
  np.testing.assert_allclose(right[1].out_BLNP, oracle(q, k, v, sight), rtol=1e-5, atol=1e-5)
  for one_way in (True, False):
    for one, other in zip(
      jax.tree.leaves(run(functools.partial(loss, one_way))), jax.tree.leaves(right), strict=True
    ):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=3e-5)


def test_heads_that_do_not_divide_are_refused():
  arrays = cast(*inputs(3))
  for attention in FORMS.values():
    with pytest.raises(ValueError, match="divide"):
      attention(*arrays)
