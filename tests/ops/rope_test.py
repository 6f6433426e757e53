import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.rope import frequencies, rope


def rotate(x, position, theta):
  """Turns channel pairs (i, i + H/2) as complex numbers in float64."""
  half = x.shape[-1] // 2
  angle = position[..., None, None] * theta ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], -1)


def random_x(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def test_rope_turns_pairs_as_complex_numbers():
  x = random_x((2, 5, 3, 8))
  position = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 100, 2000]])
  for dtype, tolerance in ((jnp.float32, 2e-4), (jnp.bfloat16, 3e-2)):
    # Float32 angles near 2000 are exact to 1e-4 radians.
    out = jax.jit(rope)(jnp.asarray(x, dtype), jnp.asarray(position), frequencies(1e4, 8))
    assert out.dtype == dtype
    expected = rotate(x, position, 1e4)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, tolerance, tolerance)


def test_position_zero_is_left_alone_and_length_is_kept():
  x = jnp.asarray(random_x((1, 4, 2, 6)), jnp.float32)
  np.testing.assert_array_equal(rope(x, jnp.zeros((1, 4), jnp.int32), frequencies(1e4, 6)), x)
  turned = rope(x, jnp.arange(4)[None], frequencies(1e4, 6))
  np.testing.assert_allclose(jnp.sum(turned**2, -1), jnp.sum(x**2, -1), rtol=1e-5)


def test_scores_depend_on_the_distance_only():
  q, k = (jnp.asarray(random_x((1, 1, 1, 16), seed), jnp.float32) for seed in (1, 2))
  turns = frequencies(1e4, 16)

  def score(q_position, k_position):
    turned_q = rope(q, jnp.full((1, 1), q_position), turns)
    return jnp.sum(turned_q * rope(k, jnp.full((1, 1), k_position), turns))

  np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-5)
  assert abs(score(9, 4) - score(4, 9)) > 1e-2


def test_an_odd_head_size_is_refused():
  with pytest.raises(ValueError, match="must be even"):
    frequencies(1e4, 3)


def test_neighbours_turn_as_the_papers_pairs_and_a_gain_lengthens_them():
  x, position = random_x((1, 5, 2, 8)), np.array([[0, 1, 5, 9, 70]])
  turns, order = frequencies(1e4, 8), [0, 2, 4, 6, 1, 3, 5, 7]
  turned = rope(jnp.asarray(x, jnp.float32), jnp.asarray(position), turns, 1.5, neighbours=True)
  right = 1.5 * rotate(x[..., order], position, 1e4)
  np.testing.assert_allclose(turned[..., order], right, rtol=1e-5, atol=2e-5)
