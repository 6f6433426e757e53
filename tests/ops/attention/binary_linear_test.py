import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.attention import binarize, binary_linear, empty_state

B, L, N, K, H = 2, 13, 4, 2, 5
SEGMENT = np.array([[1] * 4 + [0] + [2] * 6 + [0] * 2, [1] * L])


def draw(seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(B, L, N, H)), rng.normal(size=(B, L, K, H)), rng.normal(size=(B, L, K, H))


def oracle(q, k, v, segment):
  """Agreements of signs counted bit by bit, one query of one head at a time."""
  out = np.zeros_like(q)
  for b, query, n in np.ndindex(*q.shape[:3]):
    seen = [s for s in range(query + 1) if segment[b, s] == segment[b, query] > 0]
    bits = [(k[b, s, n // 2] >= 0) == (q[b, query, n] >= 0) for s in seen]
    agree = np.array([np.sum(of) for of in bits])
    if len(seen) and agree.sum():
      out[b, query, n] = agree / agree.sum() @ v[b, seen, n // 2]
  return out


def run(q, k, v, segment, state=None, chunk=4):
  arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  state = empty_state(B, K, H) if state is None else state
  return jax.jit(binary_linear, static_argnums=5)(*arrays, jnp.asarray(segment), state, chunk)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_linear_attention_equals_counting_agreements_in_float64(chunk):
  out, _ = run(*draw(), SEGMENT, chunk=chunk)
  np.testing.assert_allclose(out, oracle(*draw(), SEGMENT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [2, 4, 5, 8])
def test_a_row_in_two_calls_equals_the_row_in_one(cut):
  arrays = draw()
  whole, last = run(*arrays, SEGMENT)
  first, state = run(*(x[:, :cut] for x in arrays), SEGMENT[:, :cut])
  rest, state = run(*(x[:, cut:] for x in arrays), SEGMENT[:, cut:], state)
  np.testing.assert_allclose(np.concatenate([first, rest], 1), whole, rtol=1e-5, atol=1e-5)
  jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5),
               state, last)  # fmt: skip


def test_where_no_sign_agrees_with_any_key_nothing_is_found_and_nothing_is_not_a_number():
  q, k, v = draw()
  out, _ = run(np.abs(q) + 1, -np.abs(k) - 1, v, SEGMENT)
  # Agreements are whole numbers, so their sum is exactly 0; sums of values cancel to rounding.
  np.testing.assert_allclose(out, 0, atol=1e-5)


def test_the_gradient_goes_straight_through_a_sign_up_to_one_and_stops_there():
  x = jnp.array([-3.0, -1.0, -0.2, 0.0, 0.2, 1.0, 3.0])
  np.testing.assert_array_equal(binarize(x), [-1, -1, -1, 1, 1, 1, 1])
  slope = np.asarray(jax.grad(lambda x: jnp.sum(binarize(x) * 7))(x))
  np.testing.assert_array_equal(slope[[2, 3, 4]], 7)
  np.testing.assert_array_equal(slope[[0, 6]], 0)


def test_gradients_of_queries_and_keys_are_those_of_products_of_their_signs():
  q, k, v = (jnp.asarray(x, jnp.float32) for x in draw())
  weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

  def written_out(bq, bk, v):
    agree = (H + jnp.einsum("blkgh,bskh->bkgls", bq.reshape(B, L, K, -1, H), bk)) / 2
    mask = np.tril(SEGMENT[:, :, None] == SEGMENT[:, None]) & (SEGMENT > 0)[:, :, None]
    agree = jnp.where(mask[:, None, None], agree, 0)
    total = jnp.maximum(agree.sum(-1, keepdims=True), 1e-9)
    return jnp.sum(jnp.einsum("bkgls,bskh->blkgh", agree / total, v).reshape(q.shape) * weight)

  right = jax.jit(jax.grad(written_out, (0, 1, 2)))(jnp.sign(q), jnp.sign(k), v)
  loss = lambda *x: jnp.sum(run(*x, SEGMENT)[0] * weight)  # noqa: E731
  found = jax.grad(loss, (0, 1, 2))(q, k, v)
  inside = (np.abs(q) <= 1, np.abs(k) <= 1, np.ones(v.shape, bool))
  for one, two, through in zip(found, right, inside, strict=True):
    np.testing.assert_allclose(one, np.where(through, two, 0), rtol=1e-4, atol=1e-5)


def test_the_state_and_the_work_for_it_do_not_grow_as_the_square_of_the_length():
  temporary = {}
  for length in (512, 2048):
    q, k = (jax.ShapeDtypeStruct((1, length, heads, H), jnp.float32) for heads in (N, K))
    segment = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(binary_linear).lower(q, k, k, segment, empty_state(1, K, H)).compile()
    temporary[length] = compiled.memory_analysis().temp_size_in_bytes
  assert temporary[2048] < 6 * temporary[512]
  assert temporary[2048] < 4 * N * 2048 * 2048 / 8
