import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.attention import BACKENDS

backend = pytest.mark.parametrize("attention", BACKENDS.values(), ids=BACKENDS.keys())
SCALE = 0.3


def oracle(q, k, v, mask):
  """Attention in float64, one query of one head at a time."""
  out = np.zeros_like(q)
  group = q.shape[2] // k.shape[2]
  for b, query, n in np.ndindex(*q.shape[:3]):
    seen = np.flatnonzero(mask[b, query])
    if seen.size:
      score = SCALE * k[b, seen, n // group] @ q[b, query, n]
      weight = np.exp(score - score.max())
      out[b, query, n] = weight / weight.sum() @ v[b, seen, n // group]
  return out


def inputs(heads=4, kv_heads=2, seed=0):
  """Returns q, k, v and a mask in which query (0, 2) sees nothing and no query sees key 6."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(2, 5, heads, 8)) * 3
  k, v = rng.normal(size=(2, 2, 7, kv_heads, 8)) * 3
  mask = rng.random((2, 5, 7)) < 0.6
  mask[0, 2], mask[:, :, 6] = False, False
  return q, k, v, mask


def cast(q, k, v, mask, dtype=jnp.float32):
  return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(mask)


@backend
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_the_float64_loop(attention, kv_heads):
  arrays = inputs(4, kv_heads)
  out = jax.jit(attention)(*cast(*arrays), SCALE)
  np.testing.assert_allclose(out, oracle(*arrays), rtol=1e-5, atol=1e-5)


@backend
def test_bfloat16_attention_has_its_type_and_a_small_error(attention):
  arrays = inputs()
  out = attention(*cast(*arrays, dtype=jnp.bfloat16), SCALE)
  assert out.dtype == jnp.bfloat16
  error = np.abs(np.asarray(out, np.float64) - oracle(*arrays))
  assert np.median(error) < 2e-2


@backend
def test_a_query_that_sees_no_key_gives_zero_and_gets_no_gradient(attention):
  q, k, v, mask = cast(*inputs())
  out = attention(q, k, v, mask, SCALE)
  np.testing.assert_array_equal(out[0, 2], 0.0)
  assert np.all(np.any(out[1] != 0, axis=-1))
  grads = jax.grad(lambda *x: jnp.sum(attention(*x, mask, SCALE)[0, 2]), (0, 1, 2))(q, k, v)
  for grad in grads:
    np.testing.assert_array_equal(grad, 0.0)


@backend
@pytest.mark.parametrize("content", [0.0, 1e30, -1e37])
def test_a_hidden_key_changes_nothing_bit_for_bit(attention, content):
  q, k, v, mask = cast(*inputs())

  def loss(q, k, v):
    return jnp.sum(jnp.sin(attention(q, k, v, mask, SCALE)))

  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  plain = run(q, k, v)
  dirty = run(q, k.at[:, 6].set(content), v.at[:, 6].set(content))
  jax.tree.map(np.testing.assert_array_equal, plain, dirty)


@backend
def test_gradients_equal_the_reference_in_finite_differences(attention):
  arrays = inputs(seed=3)
  q, k, v, mask = cast(*arrays)
  rng = np.random.default_rng(4)
  weight = rng.normal(size=arrays[0].shape)
  directions = [rng.normal(size=x.shape) for x in (q, k, v)]
  loss = lambda *x: jnp.sum(attention(*x, mask, SCALE) * weight)  # noqa: E731
  grads = jax.grad(loss, (0, 1, 2))(q, k, v)
  step = 1e-5
  for index, (grad, direction) in enumerate(zip(grads, directions, strict=True)):
    moved = [list(arrays[:3]), list(arrays[:3])]
    moved[0][index] = arrays[index] + step * direction
    moved[1][index] = arrays[index] - step * direction
    above, below = (np.sum(oracle(*x, arrays[3]) * weight) for x in moved)
    # Finite differences in float64 are good to 1e-8; the rest is float32.
    np.testing.assert_allclose(np.sum(grad * direction), (above - below) / (2 * step), rtol=1e-4)


def test_heads_that_do_not_divide_are_refused():
  q, k, v, mask = cast(*inputs(3, 2))
  with pytest.raises(ValueError, match="divide"):
    BACKENDS["reference"](q, k, v, mask, SCALE)
