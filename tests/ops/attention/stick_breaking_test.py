import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.attention import STICK_BREAKING, stick_blocks

SCALE, B, L, S, H = 0.3, 2, 11, 13, 4
# Blocks of 4, so that 11 queries and 13 keys make several, the last ones not full.
FORMS = {
  "reference": STICK_BREAKING["reference"], "blocks of 4": lambda *x: stick_blocks(*x, 4)
}  # fmt: skip
form = pytest.mark.parametrize("attention", FORMS.values(), ids=FORMS.keys())


def oracle(q, k, v, mask):
  """The product of ModuleFormer's section 2.2 in float64, one query of one head at a time."""
  out = np.zeros_like(q)
  group = q.shape[2] // k.shape[2]
  for b, query, n in np.ndindex(*q.shape[:3]):
    left = 1.0
    for key in np.flatnonzero(mask[b, query])[::-1]:
      beta = 1 / (1 + np.exp(-SCALE * q[b, query, n] @ k[b, key, n // group]))
      out[b, query, n] += beta * left * v[b, key, n // group]
      left *= 1 - beta
  return out


def inputs(kv_heads=2, seed=0):
  """Returns q, k, v and a causal mask with holes; (0, 2) sees nothing, nobody sees key 6."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(B, L, 4, H)) * 3
  k, v = rng.normal(size=(2, B, S, kv_heads, H)) * 3
  mask = (rng.random((B, L, S)) < 0.8) & (np.arange(S) <= np.arange(L)[:, None] + S - L)
  mask[0, 2], mask[:, :, 6] = False, False
  return q, k, v, mask


def cast(q, k, v, mask, dtype=jnp.float32):
  return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(mask)


def graded(attention):
  """Returns a compiled function to the output and the gradients of a sum of its sines."""

  def loss(q, k, v, mask):
    out = attention(q, k, v, mask, SCALE)
    return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@form
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_stick_breaking_equals_the_float64_product_loop(attention, kv_heads):
  arrays = inputs(kv_heads)
  out = jax.jit(attention, static_argnums=4)(*cast(*arrays), SCALE)
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
  for name, attention in {**FORMS, **STICK_BREAKING}.items():
    _, found = graded(attention)(*arrays)
    for one, other in zip(found, right, strict=True):
      # Sums over keys in another order.
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5, err_msg=name)


@form
def test_bfloat16_has_its_type_and_a_small_error_also_in_gradients(attention):
  arrays = inputs()
  (_, out), grads = graded(attention)(*cast(*arrays, dtype=jnp.bfloat16))
  assert out.dtype == jnp.bfloat16 and all(grad.dtype == jnp.bfloat16 for grad in grads)
  assert np.median(np.abs(np.asarray(out, np.float64) - oracle(*arrays))) < 2e-2
  (_, _), right = graded(attention)(*cast(*arrays))
  for one, other in zip(grads, right, strict=True):
    assert np.median(np.abs(np.asarray(one, np.float32) - np.asarray(other))) < 2e-2


@form
def test_shares_sum_to_at_most_one_and_the_last_key_is_served_first(attention):
  q, k, _, mask = cast(*inputs(4))
  ones = jnp.ones_like(k)
  total = np.asarray(attention(q, k, ones, mask, SCALE))[..., 0]
  assert (total <= 1 + 1e-6).all() and (total[1] > 0).all()
  assert (total < 0.95).any(), "what no key takes stays unassigned"
  # A last key that takes all hides those before it; a softmax would share with equal ones.
  same = jnp.ones_like(k) * 20
  v = jnp.broadcast_to(jnp.arange(S, dtype=jnp.float32)[None, :, None, None], k.shape)
  causal = jnp.tril(jnp.ones((B, L, S), bool), S - L)
  out = attention(jnp.ones_like(q) * 20, same, v, causal, SCALE)
  np.testing.assert_array_equal(out[0, :, 0, 0], np.arange(L) + S - L)


@form
def test_far_keys_keep_their_digits_where_the_sum_of_logarithms_is_large(attention):
  # Key 0 leaves the last key's share to rounding if sums were made from the front and subtracted.
  k = np.zeros((1, 200, 1, H))
  k[:, :100] = 300.0
  q, v = np.ones((1, 1, 1, H)), np.random.default_rng(0).normal(size=k.shape)
  mask = np.ones((1, 1, 200), bool)
  out = attention(*cast(q, k, v, mask), SCALE)
  np.testing.assert_allclose(out, oracle(q, k, v, mask), rtol=1e-5, atol=1e-7)


@form
@pytest.mark.parametrize("content", [0.0, 1e30, -1e37])
def test_a_hidden_key_takes_nothing_of_the_stick_bit_for_bit(attention, content):
  q, k, v, mask = cast(*inputs())
  run = graded(attention)
  plain = run(q, k, v, mask)
  dirty = run(q, k.at[:, 6].set(content), v.at[:, 6].set(content), mask)
  jax.tree.map(np.testing.assert_array_equal, plain, dirty)
  # Nor is its place seen: without it the rest is as it was.
  cut = lambda x, dim: jnp.delete(x, 6, axis=dim)  # noqa: E731
  without = attention(q, cut(k, 1), cut(v, 1), cut(mask, 2), SCALE)
  np.testing.assert_allclose(plain[0][1], without, rtol=1e-6, atol=1e-6)


@form
def test_a_query_that_sees_no_key_gives_zero_and_gets_no_gradient(attention):
  q, k, v, mask = cast(*inputs())
  (_, out), grads = graded(attention)(q, k, v, mask)
  np.testing.assert_array_equal(out[0, 2], 0.0)
  np.testing.assert_array_equal(grads[0][0, 2], 0.0)
  np.testing.assert_array_equal(grads[1][:, 6], 0.0)
  assert np.all(np.any(grads[0][1] != 0, axis=-1))


@form
def test_a_later_key_changes_no_earlier_query_bit_for_bit(attention):
  q, k, v, _ = cast(*inputs())
  causal = jnp.tril(jnp.ones((B, L, S), bool), S - L)
  run = jax.jit(attention, static_argnums=4)
  before = np.asarray(run(q, k, v, causal, SCALE))
  for at in range(S - L, S):
    after = np.asarray(run(q, k.at[:, at].add(1.0), v.at[:, at].add(1.0), causal, SCALE))
    first = at - (S - L)
    np.testing.assert_array_equal(after[:, :first], before[:, :first])
    assert (after[:, first] != before[:, first]).any(axis=(1, 2)).all()


def test_the_blocks_hold_no_array_over_all_queries_and_keys_but_the_mask():
  long, shape = 512, (1, 512, 4, 8)
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3 + [
    jax.ShapeDtypeStruct((1, long, long), bool)
  ]
  temporary = {
    name: graded(STICK_BREAKING[name]).lower(*arrays).compile().memory_analysis()
    .temp_size_in_bytes
    for name in STICK_BREAKING
  }  # fmt: skip
  scores = 4 * long * long * 4
  assert temporary["reference"] > scores
  assert temporary["blocks"] < scores / 2


def test_heads_that_do_not_divide_are_refused():
  q, k, v, mask = cast(*inputs(3))
  for attention in STICK_BREAKING.values():
    with pytest.raises(ValueError, match="divide"):
      attention(q, k, v, mask, SCALE)
