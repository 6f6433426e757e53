import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.moe.routers.noise import Gumbel, Noisy

T, D, E, A, TRIALS = 3, 4, 5, 2, 40_000


def noisy_seen(seen_of, weight):
  rng = np.random.default_rng(0)
  x, logits = jnp.asarray(rng.normal(size=(T, D)), jnp.float32), rng.normal(size=(T, E))
  return seen_of(Noisy(), logits, A, x_TD=x, parameters={"noise": jnp.asarray(weight, jnp.float32)})


def test_noise_starts_at_the_deviation_of_a_zero_matrix():
  params = Noisy().parameters(Init(Keys.from_seed(0)), D, E)
  np.testing.assert_array_equal(params["noise"][...], np.zeros((D, E)))


def test_the_load_is_how_often_an_expert_is_chosen_when_its_own_noise_is_drawn_again(seen_of):
  weight = np.random.default_rng(1).normal(size=(D, E))
  seen = noisy_seen(seen_of, weight)
  load = np.asarray(Noisy().select(seen).load_TE)
  deviation = np.log1p(np.exp(np.asarray(seen.x_TD) @ weight))
  drawn = np.asarray(jax.random.normal(seen.keys("noise"), (T, E)))
  logits = np.asarray(seen.logits_TE)
  rng = np.random.default_rng(2)
  for i in range(E):
    again = np.repeat(drawn[None], TRIALS, axis=0)
    again[:, :, i] = rng.normal(size=(TRIALS, T))
    rank = np.argsort(np.argsort(-(logits + again * deviation), axis=2), axis=2)
    often = np.mean(rank[:, :, i] < A, axis=0)
    bound = 4 * np.sqrt(load[:, i] * (1 - load[:, i]) / TRIALS) + 1e-6
    assert (np.abs(often - load[:, i]) < bound).all()


def test_gradients_stay_finite_where_a_deviation_has_died(seen_of):
  seen = noisy_seen(seen_of, np.zeros((D, E)))

  def value(weight, sign):
    moved = dataclasses.replace(seen, parameters={"noise": weight}, x_TD=sign * seen.x_TD)
    chosen = Noisy().select(moved)
    return jnp.sum(chosen.load_TE**2) + jnp.sum(chosen.weight_TA**2)

  for sign in (1.0, -1.0):
    grads = jax.grad(value)(jnp.full((D, E), 1e3), sign)
    assert np.isfinite(grads).all()


def test_gumbel_noise_draws_experts_without_replacement_in_proportion_to_their_softmax(seen_of):
  share = np.array([0.5, 0.3, 0.15, 0.05])
  seen = seen_of(Gumbel(), np.log(np.tile(share, (TRIALS, 1))))
  chosen = Gumbel().select(seen)
  pairs = np.asarray(chosen.expert_TA)
  for first, second in itertools.permutations(range(4), 2):
    p = share[first] * share[second] / (1 - share[first])
    often = np.mean((pairs == [first, second]).all(1))
    assert abs(often - p) < 4.5 * np.sqrt(p * (1 - p) / TRIALS)
  of_pair = share[pairs] / share[pairs].sum(1, keepdims=True)
  np.testing.assert_allclose(chosen.weight_TA, of_pair, rtol=1e-5)
