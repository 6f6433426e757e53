import jax.numpy as jnp
import numpy as np

from jaxmoe.core.metrics import Mean


def test_means_over_parts_of_different_size_add_up_to_the_mean_over_all():
  values, weights = np.arange(10.0), np.array([1, 0, 2, 1, 1, 0, 0, 3, 1, 1.0])
  parts = [Mean.of(jnp.array(values[part]), jnp.array(weights[part])) for part in (
    slice(0, 3), slice(3, 4), slice(4, 10))]
  total = sum(parts, Mean.zero())
  np.testing.assert_allclose(total.value, np.average(values, weights=weights), rtol=1e-6)


def test_a_value_of_weight_zero_never_counts_even_if_it_is_not_a_number():
  mean = Mean.of(jnp.array([1.0, np.nan, np.inf]), jnp.array([2.0, 0.0, 0.0]))
  assert float(mean.value) == 1.0


def test_the_mean_of_nothing_is_zero():
  assert float(Mean.zero().value) == 0.0
