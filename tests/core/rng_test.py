import jax
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys


def bits(key) -> tuple[int, ...]:
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_a_key_depends_on_its_name_and_not_on_the_order_of_calls():
  keys = Keys.from_seed(1)
  first, second = bits(keys("a")), bits(keys("b"))
  assert first != second
  again = Keys.from_seed(1)
  assert bits(again("b")) == second
  assert bits(again("a")) == first


def test_namespaces_and_layers_and_seeds_have_keys_of_their_own():
  keys = Keys.from_seed(1)
  made = [keys("a"), (keys / "x")("a"), keys.at(0)("a"), keys.at(1)("a"), Keys.from_seed(2)("a")]
  assert len({bits(key) for key in made}) == len(made)


def test_a_layer_made_under_vmap_has_the_key_of_the_layer_made_alone():
  keys = Keys.from_seed(3) / "block"
  many = jax.vmap(lambda index: jax.random.normal(keys.at(index)("w"), (4,)))(np.arange(3))
  np.testing.assert_array_equal(many[2], jax.random.normal(keys.at(2)("w"), (4,)))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**33 + 5])
def test_a_seed_that_would_lose_bits_is_refused(seed):
  with pytest.raises(InputError, match="seed"):
    Keys.from_seed(seed)


def test_indices_nest_instead_of_replacing_each_other():
  keys = Keys.from_seed(1)
  made = [keys.at(1).at(2)("a"), keys.at(2).at(2)("a"), keys.at(2)("a"), (keys / "x").at(2)("a")]
  assert len({bits(key) for key in made}) == len(made)
