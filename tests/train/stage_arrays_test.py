"""Checkpoints of stages: the same arrays, names and digests as of one device, and back."""

import jax
import numpy as np
import optax
import pytest

from jaxmoe.checkpoint.digest import digest
from jaxmoe.core import param_names
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig, MoEConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.train.pipeline_stages import placed_groups
from jaxmoe.train.train_state import StateSpec

SOFTMAX = SoftmaxAttention(2, 2, 4)
MOE = BlockConfig(SOFTMAX, MoEConfig(4, 2, ROUTERS["aux_free"][1], SwiGLU(mlp_dim=4)))
DENSE = BlockConfig(SOFTMAX, MLPConfig(6))
MODEL = TransformerConfig(dim=8, stack=(LayerGroup((DENSE,), 1), LayerGroup((MOE, DENSE), 3)))
LAYOUTS = {
  "one device": Parallel(),
  "fsdp": Parallel(fsdp=2),
  "stages": Parallel(pipe=3, stages=(2, 3, 2)),
  "a v beside experts and shards": Parallel(pipe=2, fsdp=2, expert=2, pipeline="zb_v"),
}


@pytest.fixture(scope="module")
def specs():
  """Returns the state's spec of each layout."""

  def spec(parallel):
    decoder = Decoder(MODEL, 13, layer_groups=placed_groups(parallel, MODEL, 13))
    return StateSpec(decoder, optax.adam(0.1), make_layout(parallel))

  return {name: spec(parallel) for name, parallel in LAYOUTS.items()}


@pytest.fixture(scope="module")
def written(specs):
  """Returns what a checkpoint holds, drawn anew: moments, too."""
  rng = np.random.default_rng(0)
  return {
    name: np.asarray(rng.normal(size=leaf.shape) * 100, leaf.dtype)
    for name, leaf in specs["one device"].abstract().items()
  }


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_state_comes_and_goes_bit_for_bit_under_the_names_of_one_device(specs, written, name):
  spec, wanted = specs[name], specs[name].abstract()
  assert wanted.keys() == written.keys()
  read = {path: jax.device_put(leaf, wanted[path].sharding) for path, leaf in written.items()}
  state = spec.from_arrays(read)
  assert jax.tree.leaves(spec.shardings) == [leaf.sharding for leaf in jax.tree.leaves(state)]
  for path, leaf in param_names.flatten(state).items():
    names = param_names.layer_names(path, spec.layer_groups) or []
    for row, one in enumerate(names):
      assert one or not np.any(leaf[row])
  again = spec.to_arrays(state)
  for path, leaf in again.items():
    np.testing.assert_array_equal(leaf, written[path], err_msg=path)
  whole = {path: jax.device_put(leaf, jax.devices()[0]) for path, leaf in written.items()}
  some = [path for path in written if "moe/experts" in path or "embed" in path]
  assert digest({path: again[path] for path in some}) == digest({p: whole[p] for p in some})


def test_a_layer_of_a_stage_lies_on_the_devices_of_its_stage_alone(specs):
  spec = specs["stages"]
  first = spec.init(3)
  arrays = spec.to_arrays(first)
  for depth, stage in enumerate((0, 0, 1, 1, 1, 2, 2)):
    of_layer = [leaf for name, leaf in arrays.items() if f"layers/{depth}/" in name]
    assert of_layer
    for leaf in of_layer:
      assert [device.id for device in leaf.sharding.device_set] == [stage]
  flat = param_names.flatten({"params": first.params})
  assert any("" in (param_names.layer_names(path, spec.layer_groups) or []) for path in flat)
