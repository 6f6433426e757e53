import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.top_k import BACKENDS

backend = pytest.mark.parametrize("top_k", BACKENDS.values(), ids=BACKENDS.keys())
T, E = 9, 6


@backend
@pytest.mark.parametrize("num", [1, 2, E])
@pytest.mark.parametrize("ties", [False, True])
def test_experts_are_those_of_the_loop_and_ties_go_to_the_lower(top_k, num, ties):
  rng = np.random.default_rng(num)
  drawn = rng.integers(0, 3, (T, E)) if ties else rng.normal(size=(T, E))
  rank = drawn.astype(np.float32)
  rank[0] = -np.inf
  expected = [sorted(range(E), key=lambda expert: (-row[expert], expert))[:num] for row in rank]
  found = jax.jit(lambda rank: top_k(rank, num))(rank)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, expected)


@backend
def test_nothing_is_differentiated(top_k):
  def value(rank):
    return jnp.sum(jnp.take_along_axis(rank, top_k(rank, 2), axis=1))

  grad = jax.grad(value)(jnp.asarray(np.random.default_rng(0).normal(size=(T, E)), jnp.float32))
  assert set(np.unique(grad)) == {0.0, 1.0}
