import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.experts.mixed_primitives import Primitives
from jaxmoe.moe.experts.multi_width import Duo
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK

D, T = 6, 12
WIDTHS = (9, 9, 3, 0)
GIVEN = np.random.default_rng(0).integers(0, len(WIDTHS), T)


def run(given, x=None):
  """Returns x, outputs and sums of a layer in which every token takes one given expert."""
  config = MoEConfig(len(WIDTHS), 1, router=TopK(normalize=False), experts=Duo(WIDTHS))
  layer = config.build(Init(Keys.from_seed(0)), D)
  if x is None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, T, D)), jnp.float32)
  slot = jnp.arange(T, dtype=jnp.int32)[None]
  tokens = Tokens(slot, slot, jnp.ones_like(slot), slot, jnp.asarray(given)[None, :, None])
  y, _, sums = layer(x, tokens, None, None)
  return x[0], y[0], sums, layer


def test_a_token_that_skips_keeps_its_stream_bit_for_bit_and_takes_no_row():
  x, y, sums, layer = run(GIVEN)
  skips = GIVEN == 3
  assert skips.any() and not skips.all()
  np.testing.assert_array_equal((x + y)[skips], x[skips])
  assert (np.abs(np.asarray(y)[~skips]).max(axis=1) > 0).all()
  assert sums.idle == skips.sum()
  rows = [part.stop - part.start for part in layer.experts.groups(len(WIDTHS))]
  assert rows == [2, 1]


def test_a_token_meets_the_width_of_its_expert_and_no_other():
  _, y, _, layer = run(GIVEN)
  state = nnx.to_pure_dict(nnx.state(layer.experts))["kinds"]
  assert state["from_0"]["down"].shape == (2, 9, D) and state["from_2"]["down"].shape == (1, 3, D)
  layer.experts.kinds["from_2"].down.set_value(jnp.zeros((1, 3, D)))
  slot = jnp.arange(T, dtype=jnp.int32)[None]
  tokens = Tokens(slot, slot, jnp.ones_like(slot), slot, jnp.asarray(GIVEN)[None, :, None])
  again = layer(run(GIVEN)[0][None], tokens, None, None)[0][0]
  np.testing.assert_array_equal(np.asarray(again)[GIVEN == 2], 0)
  np.testing.assert_array_equal(np.asarray(again)[GIVEN < 2], np.asarray(y)[GIVEN < 2])


@pytest.mark.parametrize("widths", [(), (0,), (4, 0, 4), (4, -1, 0)])
def test_widths_that_mean_nothing_are_refused(widths):
  with pytest.raises(InputError, match="widths must be at least 1"):
    Duo(widths)


@pytest.mark.parametrize("kinds", [
  (), ("identity",), ("dense", "identity", "shift"), ("dense", "shift", "dense"), ("dense", "sift"),
])  # fmt: skip
def test_kinds_that_mean_nothing_are_refused(kinds):
  with pytest.raises(InputError, match="kinds must be of"):
    Primitives(4, kinds)


def test_another_number_of_experts_is_refused():
  config = MoEConfig(4, 2, experts=Duo(WIDTHS))
  with pytest.raises(InputError, match="widths needs one number an expert"):
    dataclasses.replace(config, num_experts=5)
  with pytest.raises(InputError, match="kinds needs one name an expert"):
    dataclasses.replace(config, experts=Primitives(4, ("dense", "shift")))
