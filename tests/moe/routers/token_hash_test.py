import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.moe.routers.token_hash import Hash, mix

E, A = 8, 2


def choose(seen_of, router, ids):
  logits = np.random.default_rng(0).normal(size=(len(ids), E))
  return router.select(seen_of(router, logits, A, ids=ids))


def test_the_mixer_is_that_of_murmurhash3():
  np.testing.assert_array_equal(
    mix(jnp.uint32([0, 1, 0xFFFFFFFF])), np.uint32([0, 0x514E28B7, 0x81F16F39])
  )


def test_an_id_goes_to_the_same_experts_wherever_it_stands_and_in_every_run(seen_of):
  ids = np.arange(6)
  expert = np.asarray(choose(seen_of, Hash(), ids).expert_TA)
  again = np.asarray(choose(seen_of, Hash(), np.repeat(ids[::-1], 3)).expert_TA)
  np.testing.assert_array_equal(again, np.repeat(expert[::-1], 3, axis=0))
  np.testing.assert_array_equal(expert, GOLDEN)


# The oracle of tests/contracts, in Python's integers, gives these too.
GOLDEN = [[5, 3], [4, 3], [6, 0], [0, 4], [7, 0], [7, 4]]


def test_experts_are_drawn_alike_and_independently_of_the_seed_and_each_other(seen_of):
  ids, num = np.arange(20_000), 20_000
  for seed in (0, 1, 2**32 - 1):
    expert = np.asarray(choose(seen_of, Hash(seed=seed), ids).expert_TA)
    pairs = np.zeros((E, E))
    np.add.at(pairs, tuple(expert.T), 1)
    mean = num / (E * (E - 1))
    assert (np.diag(pairs) == 0).all()
    assert np.abs(pairs[~np.eye(E, dtype=bool)] - mean).max() < 5 * np.sqrt(mean)
  first = np.asarray(choose(seen_of, Hash(seed=0), ids).expert_TA)[:, 0]
  same = np.mean(first == expert[:, 0])
  assert abs(same - 1 / E) < 5 * np.sqrt(1 / E / num)


def test_weights_are_alike_or_those_of_the_gate(seen_of):
  ids = np.arange(50)
  np.testing.assert_allclose(choose(seen_of, Hash(), ids).weight_TA, 1 / A)
  np.testing.assert_allclose(choose(seen_of, Hash(normalize=False), ids).weight_TA, 1)
  weight = np.asarray(choose(seen_of, Hash(by_score=True), ids).weight_TA)
  np.testing.assert_allclose(weight.sum(1), 1, rtol=1e-6)
  assert np.std(weight) > 0.1


def test_a_seed_beyond_32_bits_is_refused():
  with pytest.raises(InputError, match="seed must fit 32 bits"):
    Hash(seed=2**32)
