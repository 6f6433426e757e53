import functools
import math
import random
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.decimals import decimal, times_nearest, times_up

MOST = 300
drawn = random.Random(0)
RATIOS = [
  decimal(factor) * active / experts
  for factor in (1.1, 1.2, 0.07, 1e-05, 3, 2.5, 0.1234567890123456, 1 / 3, 1.0000000000000002)
  for active, experts in ((1, 4), (2, 5), (8, 8))
] + [Fraction(drawn.randrange(1, 10**9), drawn.randrange(1, 10**9)) for _ in range(9)]


@pytest.mark.parametrize("times, right", [(times_up, math.ceil), (times_nearest, round)])
def test_products_are_those_of_fractions_at_every_count(times, right):
  counts = np.arange(MOST + 1)
  for ratio in RATIOS:
    got = times(jnp.asarray(counts), ratio, MOST)
    assert got.dtype == jnp.int32
    expected = [right(int(count) * ratio) for count in counts]
    np.testing.assert_array_equal(got, expected, err_msg=str(ratio))


@pytest.mark.parametrize("times, right", [(times_up, math.ceil), (times_nearest, round)])
def test_counts_near_the_end_of_int32_do_not_overflow(times, right):
  most, ratio = 2**29, decimal(1.2345678901234567)
  counts = [0, 1, 12345678, most - 1, most]
  got = jax.jit(functools.partial(times, ratio=ratio, most=most))(jnp.asarray(counts))
  np.testing.assert_array_equal(got, [right(count * ratio) for count in counts])


def test_a_setting_is_the_decimal_it_is_written_as():
  assert decimal(1.1) == Fraction(11, 10) != Fraction(1.1)
  assert decimal(1e-05) == Fraction(1, 100_000)
  assert decimal(2) == 2
