"""Layers that lie in memory in an order of their own: the same model under the same names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.core.param_names import EMPTY
from jaxmoe.core.rng import Keys
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.layer_runs import layer_runs
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.parallel.stages import Stages, check_counts, cut_by_cost

SOFTMAX = SoftmaxAttention(2, 1, 4)
A, B = (BlockConfig(SOFTMAX, MLPConfig(width)) for width in (6, 4))
MODEL = TransformerConfig(dim=8, stack=(LayerGroup((B,), 1), LayerGroup((A, B), 3)))
PLACES = {
  "one stage a device": Stages((3, 2, 2), (0, 1, 2)),
  "rounds": Stages((2, 2, 2, 1), (0, 1, 0, 1)),
  "a v": Stages((1, 3, 1, 2), (0, 1, 1, 0)),
}
each = pytest.mark.parametrize("stages", PLACES.values(), ids=PLACES)


def decoders(stages):
  plain = Decoder(MODEL, 11)
  return plain, Decoder(MODEL, 11, layer_groups=stages.placed(plain.layer_groups))


@each
def test_first_values_names_and_count_are_those_of_layers_in_order(stages):
  plain, placed = decoders(stages)
  found = []
  for decoder in (plain, placed):
    flat = param_names.flatten(decoder.init(Keys.from_seed(0)))
    found.append(param_names.unstack(flat, decoder.layer_groups))
  assert found[0].keys() == found[1].keys()
  jax.tree.map(np.testing.assert_array_equal, *found)
  assert plain.num_params == placed.num_params
  again = param_names.stack(found[1], list(flat), placed.layer_groups)
  jax.tree.map(np.testing.assert_array_equal, again, flat)


@each
def test_a_model_whose_layers_lie_apart_computes_what_it_does_in_order(stages):
  plain, placed = decoders(stages)
  ids = jnp.arange(10).reshape(2, 5)
  true, found = (decoder(decoder.init(Keys.from_seed(0)), ids) for decoder in (plain, placed))
  np.testing.assert_allclose(found, true, rtol=1e-5, atol=1e-6)


@each
def test_a_stages_runs_lie_in_its_devices_part_of_every_leaf(stages):
  _, placed = decoders(stages)
  for stage, device in enumerate(stages.device_of):
    start, stop = stages.bounds(stage)
    depths = []
    for run in layer_runs(placed.layer_groups, start, stop):
      for number in range(run.stop - run.start):
        one = run.repeat(number)
        for j in one.positions:
          rows = placed.layer_groups[int(run.group)].rows[int(j)]
          room = len(rows) // stages.num_devices
          assert one.row(j) // room == device
          assert rows[one.row(j)] == one.start != EMPTY
          depths.append(one.depth + int(j))
    assert depths == list(range(start, stop))


def test_stages_are_cut_so_that_the_costliest_costs_least():
  assert cut_by_cost([1, 1, 1, 1, 4], 2) == (4, 1)
  assert cut_by_cost([1] * 7, 4) in ((2, 2, 2, 1), (1, 2, 2, 2))
  assert cut_by_cost([5, 1, 1, 1], 4) == (1, 1, 1, 1)


@pytest.mark.parametrize("counts", [(3, 4), (3, 2, 1), (4, 3, 0)])
def test_numbers_that_are_not_those_of_the_layers_are_refused_in_one_line(counts):
  with pytest.raises(InputError, match=r"stages must give each of 3 stages .* 7 layers"):
    check_counts(counts, 7, 3)
