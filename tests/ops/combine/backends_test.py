import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.combine import BACKENDS

T, A, R, D = 6, 3, 20, 5
backend = pytest.mark.parametrize("combine", BACKENDS.values(), ids=BACKENDS.keys())


def rows_of(case):
  rng = np.random.default_rng(1)
  row_TA = rng.permutation(R)[: T * A].reshape(T, A)
  return {
    "every choice has a row": row_TA,
    "some have none": np.where(rng.random((T, A)) < 0.4, R, row_TA),
    "none has one": np.full((T, A), R),
    "one has one": np.where(np.arange(T * A).reshape(T, A) == 7, row_TA, R),
  }[case]


CASES = ["every choice has a row", "some have none", "none has one", "one has one"]


def inputs():
  rng = np.random.default_rng(0)
  return rng.normal(size=(R, D)), rng.normal(size=(T, A)), rng.normal(size=(T, D))


@backend
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_float64_loop(combine, case):
  rows, weight, grad_y = inputs()
  row_TA = rows_of(case)
  y, grad_rows, grad_weight = np.zeros((T, D)), np.zeros((R, D)), np.zeros((T, A))
  for (token, choice), row in np.ndenumerate(row_TA):
    if row < R:
      y[token] += weight[token, choice] * rows[row]
      grad_rows[row] += weight[token, choice] * grad_y[token]
      grad_weight[token, choice] = rows[row] @ grad_y[token]

  @jax.jit
  def run(rows, weight, grad_y):
    out, vjp = jax.vjp(lambda *x: combine(x[0], jnp.asarray(row_TA), x[1]), rows, weight)
    return out, *vjp(grad_y)

  got = run(*(jnp.asarray(x, jnp.float32) for x in (rows, weight, grad_y)))
  for one, right in zip(got, (y, grad_rows, grad_weight), strict=True):
    np.testing.assert_allclose(one, right, rtol=1e-5, atol=1e-5)


@backend
def test_bfloat16_rows_are_summed_in_float32_and_rounded_once(combine):
  rows = jnp.full((2, D), 1, jnp.bfloat16)
  weight = jnp.asarray([[256.0, 1.0]], jnp.float32)
  y = combine(rows, jnp.asarray([[0, 1]]), weight)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, jnp.asarray(257.0).astype(jnp.bfloat16))


@backend
def test_rows_of_others_never_change_a_sum_bit_for_bit(combine):
  rows, weight, _ = (jnp.asarray(x, jnp.float32) for x in inputs())
  row_TA = rows_of("some have none")
  run = jax.jit(lambda rows: combine(rows, jnp.asarray(row_TA), weight))
  before = np.asarray(run(rows))
  for token in range(T):
    mine = np.isin(np.arange(R), row_TA[token])[:, None]
    np.testing.assert_array_equal(run(jnp.where(mine, rows, -7 * rows))[token], before[token])
