import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.grouped_matmul import BACKENDS, mosaic_tpu, uniform
from jaxmoe.ops.grouped_matmul.mosaic_tpu import RowTiles

# Tiles that divide neither rows nor columns.
TILED = functools.partial(mosaic_tpu, tiles=RowTiles(64, 4, 4, interpret=True))
FORMS = {**BACKENDS, "mosaic_tpu": TILED}
backend = pytest.mark.parametrize("matmul", FORMS.values(), ids=FORMS.keys())
ROWS, D, F = 300, 5, 7
SIZES = {
  "a slot without rows": [100, 0, 150, 50],
  "all rows on one slot": [0, 300, 0, 0],
  "one row in all": [0, 0, 1, 0],
  "sizes that divide nothing": [129, 1, 127, 43],
  "rows left over": [3, 128, 0, 61],
  "no rows": [0, 0, 0, 0],
  "one slot": [299],
  "block edges": [128, 128, 0, 44],
}
sizes_cases = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def inputs(num_slots, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(ROWS, D)), rng.normal(size=(num_slots, D, F)), rng.normal(size=(ROWS, F))


def oracle(rows, weight, sizes, grad_out):
  """Returns float64 (out, grad of rows, grad of weight), slot by slot."""
  out, grad_rows, grad_weight = np.zeros((ROWS, F)), np.zeros((ROWS, D)), np.zeros_like(weight)
  start = 0
  for slot, size in enumerate(sizes):
    mine = slice(start, start + size)
    out[mine] = rows[mine] @ weight[slot]
    grad_rows[mine] = grad_out[mine] @ weight[slot].T
    grad_weight[slot] = rows[mine].T @ grad_out[mine]
    start += size
  return out, grad_rows, grad_weight


def run(matmul, rows, weight, sizes, grad_out, dtype=jnp.float32):
  rows, weight, grad_out = (jnp.asarray(x, dtype) for x in (rows, weight, grad_out))
  return all_of(matmul, rows, weight, jnp.asarray(sizes, jnp.int32), grad_out)


@functools.partial(jax.jit, static_argnums=0)
def all_of(matmul, rows, weight, sizes, grad_out):
  out, vjp = jax.vjp(lambda rows, weight: matmul(rows, weight, sizes), rows, weight)
  return out, *vjp(grad_out)


@backend
@sizes_cases
def test_values_and_gradients_equal_the_float64_loop(matmul, sizes):
  rows, weight, grad_out = inputs(len(sizes))
  expected = oracle(rows, weight, sizes, grad_out)
  for got, right in zip(run(matmul, rows, weight, sizes, grad_out), expected, strict=True):
    # Up to 300 products of size 1 in one float32 sum.
    np.testing.assert_allclose(got, right, rtol=1e-5, atol=3e-5)


@backend
def test_rows_past_the_sizes_are_exact_zeros_and_give_nothing(matmul):
  sizes = [3, 128, 0, 61]
  used = sum(sizes)
  rows, weight, grad_out = inputs(4)
  plain = run(matmul, rows, weight, sizes, grad_out)
  rows[used:], grad_out[used:] = np.nan, np.nan
  dirty = run(matmul, rows, weight, sizes, grad_out)
  for one, other in zip(plain, dirty, strict=True):
    np.testing.assert_array_equal(one, other)
  np.testing.assert_array_equal(plain[0][used:], 0.0)
  np.testing.assert_array_equal(plain[1][used:], 0.0)


@backend
def test_bfloat16_keeps_its_type_and_sums_in_float32(matmul):
  sizes = [129, 1, 127, 43]
  rows, weight, grad_out = inputs(4)
  # 258 ones: a bfloat16 sum of them stops at 256, and 258 itself is a bfloat16 number.
  expected = oracle(rows, weight, sizes, grad_out)
  got = run(matmul, rows, weight, sizes, grad_out, jnp.bfloat16)
  for one, right in zip(got, expected, strict=True):
    assert one.dtype == jnp.bfloat16
    assert np.median(np.abs(np.asarray(one, np.float64) - right)) < 2e-2
  ones = np.ones((ROWS, D)), np.ones((1, D, F)), np.ones((ROWS, F))
  grad_weight = run(matmul, *ones[:2], [258], ones[2], jnp.bfloat16)[2]
  np.testing.assert_array_equal(np.asarray(grad_weight, np.float32), 258.0)


@pytest.mark.parametrize("rows_per_slot", [0, 1, 75])
def test_uniform_equals_the_loop_over_equal_sizes(rows_per_slot):
  rows, weight, _ = inputs(4)
  rows = jnp.asarray(rows[: 4 * rows_per_slot], jnp.float32)
  weight = jnp.asarray(weight, jnp.float32)
  sizes = jnp.full((4,), rows_per_slot, jnp.int32)
  out = uniform(rows, weight, rows_per_slot)
  np.testing.assert_allclose(out, BACKENDS["loop"](rows, weight, sizes), rtol=1e-5, atol=1e-6)


def test_uniform_refuses_rows_that_do_not_fill_the_slots():
  with pytest.raises(ValueError, match="num_slots"):
    uniform(jnp.zeros((7, D)), jnp.zeros((2, D, F)), 4)
