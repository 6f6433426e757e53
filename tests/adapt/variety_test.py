"""Copies of a dense network that differ: by noise, or by hidden units drawn anew."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.adapt import Variety
from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys

E, D, F = 3, 32, 64
KEYS = Keys.from_seed(3)


def copies(dtype=np.float32):
  rng = np.random.default_rng(0)
  gate_up = rng.normal(0, [[[0.5]], [[2.0]]], (2, D, F)).transpose(1, 0, 2)
  down = rng.normal(0.3, 0.1, (F, D))
  return [np.broadcast_to(x.astype(dtype)[None], (E, *x.shape)) for x in (gate_up, down)]


def by_matrix(gate_up, down):
  """Gate, up and down of all experts with the hidden units last."""
  return gate_up[:, :, 0], gate_up[:, :, 1], down.swapaxes(1, 2)


def test_nothing_is_changed_by_default():
  for before, after in zip(copies(), Variety().apply(*copies(), KEYS), strict=True):
    np.testing.assert_array_equal(before, after)


def test_noise_has_a_share_of_the_deviation_of_each_matrix_and_differs_between_experts():
  after = by_matrix(*Variety(noise=0.1).apply(*copies(), KEYS))
  for x, y in zip(by_matrix(*copies()), after, strict=True):
    noise = y - x
    np.testing.assert_allclose(noise.std(axis=(1, 2)), 0.1 * x[0].std(), rtol=0.1)
    assert np.abs(np.corrcoef(noise.reshape(E, -1)) - np.eye(E)).max() < 0.1


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_share_of_hidden_units_is_drawn_anew_in_all_three_matrices(dtype):
  after = by_matrix(*Variety(drop=0.4).apply(*copies(dtype), KEYS))
  units = []
  for x, y in zip(by_matrix(*copies(dtype)), after, strict=True):
    assert y.dtype == x.dtype
    x, y = x.astype(np.float32), y.astype(np.float32)
    changed = (x != y).any(axis=1)
    assert (changed.sum(axis=1) == int(0.4 * F)).all()
    for expert in range(E):
      old, new = x[expert][:, changed[expert]], y[expert][:, changed[expert]]
      assert abs(new.mean() - old.mean()) < 4 * old.std() / old.size**0.5
      np.testing.assert_allclose(new.std(), old.std(), rtol=0.1)
      assert abs(np.corrcoef(new.ravel(), old.ravel())[0, 1]) < 0.15
    units.append(changed)
  assert (units[0] == units[1]).all() and (units[0] == units[2]).all()
  assert len({tuple(of) for of in units[0]}) == E  # each expert other ones


def test_a_share_of_hidden_units_is_the_decimal_it_is_written_as():
  before = [np.ones((1, 2, 2, 100), np.float32), np.ones((1, 100, 2), np.float32)]
  before[1][:] = np.arange(2)
  _, down = Variety(drop=0.29).apply(*before, KEYS)
  assert (down != before[1]).any(axis=(0, 2)).sum() == 29


def test_settings_out_of_bounds_are_refused():
  for settings in ({"noise": -0.1}, {"drop": -0.1}, {"drop": 1.5}):
    with pytest.raises(InputError, match=next(iter(settings))):
      Variety(**settings)
