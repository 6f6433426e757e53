"""What any of ten layouts writes any other reads: bits, names, digests and data state."""

import itertools
import json

import jax
import numpy as np
import optax
import pytest

from jaxmoe.checkpoint.digest import digest
from jaxmoe.checkpoint.orbax_store import OrbaxStore
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig, MoEConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.train.pipeline_stages import placed_groups
from jaxmoe.train.train_state import StateSpec, read_state

SOFTMAX = SoftmaxAttention(4, 2, 4)
MOE = BlockConfig(SOFTMAX, MoEConfig(4, 2, ROUTERS["aux_free"][1], SwiGLU(mlp_dim=8)))
DENSE = BlockConfig(SOFTMAX, MLPConfig(8))
MODEL = TransformerConfig(dim=8, stack=(LayerGroup((DENSE,), 1), LayerGroup((MOE, DENSE), 3)))
LAYOUTS = {
  "one device": Parallel(),
  "data": Parallel(data=4),
  "fsdp 3": Parallel(fsdp=4, zero=3),
  "expert": Parallel(expert=4),
  "tensor": Parallel(tensor=2),
  "context": Parallel(context=2, attend="ring"),
  "gpipe": Parallel(pipe=2, pipeline="gpipe", stages=(3, 4)),
  "interleaved": Parallel(pipe=2, pipeline="interleaved"),
  "dualpipe_v": Parallel(pipe=2, pipeline="dualpipe_v"),
  "context, pipe and expert": Parallel(context=2, pipe=2, expert=2, attend="ring"),
  "a vocabulary over stages and tensor": Parallel(pipe=2, tensor=2, head="one_barrier"),
}
DATA = {"epoch": 3, "places": [7, 1 << 40], "mixture": {"a": 0.1}}


def spec_of(name):
  parallel = LAYOUTS[name]
  decoder = Decoder(MODEL, 13, layer_groups=placed_groups(parallel, MODEL, 13))
  return StateSpec(decoder, optax.adam(0.1), make_layout(parallel))


@pytest.fixture(scope="module")
def specs():
  return {name: spec_of(name) for name in LAYOUTS}


@pytest.fixture(scope="module")
def drawn(specs):
  """Returns the arrays of a state: parameters, moments and buffers, none of them zero."""
  rng = np.random.default_rng(0)
  return {
    name: np.asarray(rng.normal(size=leaf.shape) * 100, leaf.dtype)
    for name, leaf in specs["one device"].abstract().items()
  }


@pytest.fixture(scope="module")
def stores(specs, drawn, tmp_path_factory):
  """Returns a store by layout, with a step that it wrote."""
  folder, found = tmp_path_factory.mktemp("stores"), {}
  for name, spec in specs.items():
    wanted = spec.abstract()
    state = spec.from_arrays({
      path: jax.device_put(leaf, wanted[path].sharding) for path, leaf in drawn.items()
    })  # fmt: skip
    arrays = spec.to_arrays(state)
    words = {path: list(of) for path, of in digest(arrays).items()}
    found[name] = OrbaxStore(folder / name.replace(" ", "_"))
    found[name].write(5, arrays, {"data": DATA, "digest": words})
    found[name].wait()
  yield found
  for store in found.values():
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("source, target", list(itertools.permutations(LAYOUTS, 2)))
def test_bits_come_over(specs, drawn, stores, source, target):
  spec, damaged = specs[target], []
  found = read_state(stores[source], spec, lambda step, why: damaged.append(why))
  assert found is not None and not damaged
  step, arrays, record = found
  assert step == 5 and json.loads(json.dumps(record["data"])) == DATA
  again = spec.to_arrays(spec.from_arrays(arrays))
  assert again.keys() == drawn.keys()
  for path, leaf in again.items():
    assert np.asarray(leaf).tobytes() == drawn[path].tobytes(), path
  assert {path: list(of) for path, of in digest(again).items()} == record["digest"]
