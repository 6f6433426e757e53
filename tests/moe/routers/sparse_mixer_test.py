import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.moe.routers.sparse_mixer import SparseMixer

NUM = 40_000
# With a band of 0.25 experts 0 to 2 take part in the first draw, and 3 where it took 0 and 1 is
# the best that is left: it lies within half of 1.8, not of 2.
LOGITS = np.array([2.0, 1.8, 1.2, 0.95, -1.0])
WIDE = SparseMixer(band=0.25)


def shares(near):
  raised = np.where(np.isin(np.arange(5), near), np.exp(LOGITS), 0)
  return raised / raised.sum()


def drawn(seen_of):
  seen = seen_of(WIDE, np.tile(LOGITS, (NUM, 1)))
  return seen, WIDE.select(seen)


def test_the_first_expert_is_drawn_from_those_near_the_best_and_the_second_from_the_rest(seen_of):
  expert = np.asarray(drawn(seen_of)[1].expert_TA)
  first = np.bincount(expert[:, 0], minlength=5) / NUM
  near = shares([0, 1, 2])
  assert (np.abs(first - near) <= 4.5 * np.sqrt(near * (1 - near) / NUM)).all()
  for taken, left in ((0, [1, 2, 3]), (1, [0, 2]), (2, [0, 1])):
    of = expert[expert[:, 0] == taken, 1]
    second, near = np.bincount(of, minlength=5) / len(of), shares(left)
    assert (np.abs(second - near) <= 4.5 * np.sqrt(near * (1 - near) / len(of))).all()


def test_an_expert_that_is_not_the_best_weighs_a_third_three_times_in_four(seen_of):
  _, chosen = drawn(seen_of)
  expert, weight = np.asarray(chosen.expert_TA), np.asarray(chosen.weight_TA)
  whole = shares([0, 1, 2])
  np.testing.assert_allclose(weight[expert[:, 0] == 0, 0], whole[0], rtol=1e-5)
  of = weight[expert[:, 0] == 1, 0] / whole[1]
  third = np.isclose(of, 1 / 3, rtol=1e-5)
  assert np.isclose(of[~third], 1, rtol=1e-5).all()
  assert abs(third.mean() - 0.75) < 4.5 * np.sqrt(0.75 * 0.25 / len(of))


def test_the_mean_gradient_is_what_the_model_gains_by_an_expert_exactly_for_a_cubic(seen_of):
  seen, chosen = drawn(seen_of)
  f = lambda weight: 2 * weight**3 - weight**2 + 3 * weight  # noqa: E731

  def value(logits):
    return jnp.sum(f(WIDE.select(dataclasses.replace(seen, logits_TE=logits)).weight_TA[:, 0]))

  grads = np.asarray(jax.grad(value)(seen.logits_TE))[np.asarray(chosen.expert_TA)[:, 0] == 1]
  share = shares([0, 1, 2])
  slope = share[1] * (np.eye(5)[1] - share)
  right = f(share[1]) / share[1] * slope
  bound = 4.5 * grads.std(0) / np.sqrt(len(grads))
  assert (np.abs(grads.mean(0) - right) <= bound + 1e-6).all()
  # One node alone is not exact, nor are other chances of the two.
  assert (np.abs(grads.mean(0) - (6 * share[1] ** 2 - 2 * share[1] + 3) * slope) > bound)[:3].all()


def test_without_keys_it_takes_the_two_best_of_the_same_masked_shares(seen_of):
  chosen = WIDE.select(seen_of(WIDE, LOGITS[None], seed=None))
  np.testing.assert_array_equal(chosen.expert_TA, [[0, 1]])
  right = [[shares([0, 1, 2])[0], shares([1, 2, 3])[1]]]
  np.testing.assert_allclose(chosen.weight_TA, right, rtol=1e-6)
  alone = SparseMixer().select(seen_of(SparseMixer(), LOGITS[None]))
  np.testing.assert_array_equal(alone.expert_TA, [[0, 1]])
  np.testing.assert_array_equal(alone.weight_TA, [[1, 1]])


def test_logits_of_zero_make_all_experts_alike_and_no_gradient_that_is_not_a_number(seen_of):
  seen = seen_of(WIDE, np.zeros((3, 5)))

  def value(logits):
    chosen = WIDE.select(dataclasses.replace(seen, logits_TE=logits))
    return jnp.sum(chosen.weight_TA**2), chosen.weight_TA

  grads, weight = jax.grad(value, has_aux=True)(seen.logits_TE)
  assert np.isfinite(grads).all()
  for place, share in enumerate((1 / 5, 1 / 4)):
    assert all(np.isclose(w, (share, share / 3), rtol=1e-6).any() for w in weight[:, place])


@pytest.mark.parametrize(
  "fields, message", [({"normalize": True}, "no common sum"), ({"band": -1.0}, "not be negative")]
)
def test_settings_without_a_meaning_are_refused(fields, message):
  with pytest.raises(InputError, match=message):
    SparseMixer(**fields)
