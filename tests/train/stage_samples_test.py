"""Samples of a model whose layers lie over stages: the tokens of one device, a layer at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig, MoEConfig
from jaxmoe.models.generate import Sampling, generate
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.train.pipeline_stages import placed_groups
from jaxmoe.train.train_state import StateSpec

SOFTMAX, VOCAB = SoftmaxAttention(2, 2, 8), 19
MOE = BlockConfig(SOFTMAX, MoEConfig(4, 2, experts=SwiGLU(mlp_dim=64)))
DENSE = BlockConfig(SOFTMAX, MLPConfig(96))
MODEL = TransformerConfig(dim=16, stack=(LayerGroup((DENSE,), 1), LayerGroup((MOE,), 7)))
PROMPTS = [np.array(ids, np.int32) for ids in ([18, 3, 1], [18, *range(9)])]
LAYOUTS = {
  "one device": Parallel(),
  "stages": Parallel(pipe=4),
  "a v beside shards": Parallel(pipe=2, fsdp=2, pipeline="zb_v"),
}


@pytest.fixture(scope="module")
def models():
  """Returns the decoder of each layout and the same parameters, as they lie there."""
  one, found = None, {}
  for name, parallel in LAYOUTS.items():
    decoder = Decoder(MODEL, VOCAB, layer_groups=placed_groups(parallel, MODEL, VOCAB))
    spec = StateSpec(decoder, optax.sgd(0.1), make_layout(parallel))
    if one is None:
      one = {path: np.asarray(leaf) for path, leaf in spec.to_arrays(spec.init(3)).items()}
      one["params/head/weight"] = one["params/head/weight"] * 8
    wanted = spec.abstract()
    arrays = {path: jax.device_put(leaf, wanted[path].sharding) for path, leaf in one.items()}
    found[name] = decoder, spec.from_arrays(arrays).params
  return found


def write(model, temperature):
  return generate(*model, PROMPTS, Sampling(12, temperature), (40, 18))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one device"])
def test_stages_write_what_one_device_writes(models, name):
  written = write(models["one device"], 1.5)
  assert write(models[name], 1.5) == written
  assert len(set(map(tuple, written))) == 2


def test_no_device_holds_more_than_its_stage_and_a_layer(models):
  decoder, params = models["stages"]
  caches = decoder.caches_apart(2, 16)

  def read(params, caches):
    ids = jnp.zeros((2, 8), jnp.int32)
    return decoder.hidden(params, Tokens(ids, ids, ids + 1, ids), caches)[:2]

  memory = jax.jit(read, donate_argnums=1).lower(params, caches).compile().memory_analysis()
  stack = sum(leaf.nbytes for leaf in jax.tree.leaves(params["stack"]))
  layer = max(
    sum(leaf.nbytes // leaf.shape[0] for leaf in jax.tree.leaves(place))
    for group in params["stack"].values()
    for place in group.values()
  )
  held = memory.temp_size_in_bytes
  assert layer < held < 3 * layer < stack / 2, (held, layer, stack)
