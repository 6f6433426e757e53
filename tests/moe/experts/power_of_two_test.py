import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.moe.experts.power_of_two import STEPS, integers, pack, powers_of_two, unpack
from tests.contracts.oracles.experts import power_of_two

S, D, F = 3, 7, 5


def draw(seed=0, shape=(S, D, F)):
  return (np.random.default_rng(seed).normal(size=shape) * 0.3).astype(np.float32)


def test_a_weight_is_a_sign_and_three_bits_of_exponent_two_weights_a_byte():
  weight = draw()
  packed, top = pack(jnp.asarray(weight))
  assert packed.dtype == jnp.uint8 and packed.size == S * (D * F + 1) // 2
  np.testing.assert_array_equal(unpack(packed, top, weight.shape), power_of_two(weight))


def test_packing_what_was_unpacked_changes_no_bit():
  packed, top = pack(jnp.asarray(draw()))
  again, again_top = pack(unpack(packed, top, (S, D, F)))
  np.testing.assert_array_equal(packed, again)
  np.testing.assert_array_equal(top, again_top)


def test_products_equal_integer_shifts_and_additions_exactly():
  """Fixed-point rows: x << P, or x of STEPS more bits, added up as Python's integers."""
  weight = draw()
  rows = np.random.default_rng(1).integers(-128, 128, (4, D))
  seen = np.asarray(powers_of_two(jnp.asarray(weight)))
  packed, top = (np.asarray(part) for part in pack(jnp.asarray(weight)))
  for slot in range(S):
    codes = np.stack([packed[slot] & 15, packed[slot] >> 4], axis=1).reshape(-1)[: D * F]
    right = np.zeros((len(rows), F))
    for r, row in enumerate(rows.tolist()):
      for f in range(F):
        total = 0
        for d in range(D):
          code = int(codes[d * F + f])
          shifted = row[d] << (STEPS - (code & 7))
          total += -shifted if code & 8 else shifted
        right[r, f] = total * 2.0 ** (int(top[slot]) - STEPS)
    np.testing.assert_array_equal(rows.astype(np.float32) @ seen[slot], right)


@pytest.mark.parametrize("zeros", ["some", "all"])
def test_a_weight_of_zero_is_a_finite_power_of_two(zeros):
  weight = draw()
  weight[0] *= 0 if zeros == "all" else 1
  weight[0, 2] = 0
  seen = np.asarray(powers_of_two(jnp.asarray(weight)))
  assert np.isfinite(seen).all() and (seen != 0).all()
  least = np.abs(seen[0]).min()
  np.testing.assert_array_equal(seen[0, 2], least)


def test_a_weight_that_is_not_finite_is_not_hidden():
  weight = draw()
  weight[1, 2, 3] = np.nan
  assert not np.isfinite(powers_of_two(jnp.asarray(weight))).all()


@pytest.mark.parametrize("view", [powers_of_two, integers])
def test_the_gradient_passes_rounding_and_sign_as_it_is(view):
  weight, way = jnp.asarray(draw()), jnp.asarray(draw(1))
  grad = jax.jit(jax.grad(lambda weight: jnp.sum(view(weight) * way)))(weight)
  np.testing.assert_array_equal(grad, way)


def test_a_power_of_two_is_exact_in_bfloat16():
  seen = powers_of_two(jnp.asarray(draw()))
  np.testing.assert_array_equal(seen.astype(jnp.bfloat16).astype(jnp.float32), seen)


@pytest.mark.parametrize("view", [powers_of_two, integers])
def test_a_weight_that_is_no_array_is_refused(view):
  with pytest.raises(InputError, match="leave these experts out"):
    view(object())
