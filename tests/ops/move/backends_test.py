import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.move import BACKENDS

T, R = 7, 11
ROWS = {
  "some rows without a token": [3, 7, 0, 6, 6, 7, 1, 2, 7, 3, 3],
  "no rows": [7] * R,
  "all rows of one token": [4] * R,
}


@pytest.mark.parametrize("move", BACKENDS.values(), ids=BACKENDS.keys())
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("dims", [(), (5,), (2, 3)])
def test_values_and_gradients_equal_the_float64_loop(move, case, dims):
  rng = np.random.default_rng(0)
  values, grad_rows = rng.normal(size=(T, *dims)), rng.normal(size=(R, *dims))
  expected, grad = np.zeros((R, *dims)), np.zeros((T, *dims))
  for row, token in enumerate(ROWS[case]):
    if token < T:
      expected[row] = values[token]
      grad[token] += grad_rows[row]
  run = jax.jit(lambda values: jax.vjp(lambda x: move(x, jnp.asarray(ROWS[case])), values)[0])
  back = jax.jit(lambda v, g: jax.vjp(lambda x: move(x, jnp.asarray(ROWS[case])), v)[1](g)[0])
  values, grad_rows = (jnp.asarray(x, jnp.float32) for x in (values, grad_rows))
  np.testing.assert_array_equal(run(values), np.float32(expected))
  np.testing.assert_allclose(back(values, grad_rows), grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("move", BACKENDS.values(), ids=BACKENDS.keys())
def test_whole_numbers_stay_whole(move):
  moved = move(jnp.arange(10, 10 + T, dtype=jnp.int32), jnp.asarray([2, T, 0]))
  assert moved.dtype == jnp.int32
  np.testing.assert_array_equal(moved, [12, 0, 10])
