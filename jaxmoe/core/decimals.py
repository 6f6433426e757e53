"""Whole numbers of products with settings, which are the decimals that a recipe writes.

The float 1.1 is a little more than 1.1, so that 50 times 1.1, rounded up, is 56 where 55 is meant.
Here products are those of the decimals: fractions where all is known when a program is traced, and
int32 where it depends on its arrays.
"""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp


def decimal(number: float | int) -> Fraction:
  """Returns the shortest decimal that reads back as `number`, which is how it was written."""
  return Fraction(str(number))


def times_up(count: jax.Array, ratio: Fraction, most: int) -> jax.Array:
  """Returns ceil(count * ratio), int32, exact for 0 <= count <= most; ratio >= 0."""
  quotient, rest = _divide(count, _neighbour(ratio, most, above=True), most)
  return quotient + (rest > 0)


def times_nearest(count: jax.Array, ratio: Fraction, most: int) -> jax.Array:
  """Returns count * ratio rounded, halves to even, int32, exact for 0 <= count <= most."""
  twice = _neighbour(2 * ratio, most, above=False)
  halves, rest = _divide(count, twice, most)
  whole = halves // 2
  is_half = (rest == 0) & (twice == 2 * ratio)
  return whole + jnp.where(halves % 2 == 1, jnp.where(is_half, whole % 2, 1), 0)


def _neighbour(ratio: Fraction, most: int, above: bool) -> Fraction:
  """Returns the nearest fraction on one side, or `ratio`, of which no denominator exceeds `most`.

  No fraction with such a denominator lies between the two, so none of k / count does: multiples up
  to `most` round alike to that side.
  """
  most = max(most, 1)
  near = ratio.limit_denominator(most)
  if near == ratio or (near > ratio) == above:
    return near
  # The next one in the Farey sequence: p' q - p q' is 1 (or -1), and q' the largest there is.
  sign = 1 if above else -1
  p, q = near.numerator, near.denominator
  least = (-sign * pow(p, -1, q)) % q
  denominator = most - (most - least) % q
  return Fraction(p * denominator + sign, q * denominator)


def _divide(count: jax.Array, ratio: Fraction, most: int) -> tuple[jax.Array, jax.Array]:
  """Returns quotient and remainder of count * p by q, int32, by long division from the top bit.

  A remainder stays below 3 q, and q does not exceed `most`: nothing overflows before results do.
  """
  p, q = ratio.numerator, ratio.denominator
  assert 3 * max(most, q) < 2**31 and most * p < q * 2**31, f"too many to count: {most=}, {ratio=}"
  whole, part = divmod(p, q)
  count = count.astype(jnp.int32)
  quotient = rest = jnp.zeros_like(count)
  for bit in reversed(range(most.bit_length())):
    has = count >> bit & 1
    rest = 2 * rest + part * has
    quotient = 2 * quotient + whole * has + rest // q
    rest = rest % q
  return quotient, rest
