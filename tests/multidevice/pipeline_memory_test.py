"""Memory and programs of pipelines: as large for many microbatches as for few."""

import re

import jax
import pytest

from jaxmoe.core.rng import Keys
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.train.pipeline_stages import placed_groups
from jaxmoe.train.sharded_gradients import context_of, sharded_gradients

VOCAB, LENGTH, DIM = 32, 64, 32
BLOCK, WIDE = (BlockConfig(SoftmaxAttention(2, 1, 8), MLPConfig(width)) for width in (32, 256))


def spread(decoder, layout):
  """Returns the shapes of parameters where they lie."""
  lies = layout.shardings("params", decoder.dims, decoder.shapes)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    decoder.shapes, lies,
  )  # fmt: skip


def compiled(pipeline, num_micro, head="last"):
  """Returns the gradient of rows that pass a pipeline of two devices one by one, compiled."""
  parallel = Parallel(pipe=2, pipeline=pipeline, head=head)
  config = TransformerConfig(dim=DIM, stack=(LayerGroup((BLOCK,), 4),))
  decoder = Decoder(config, VOCAB, layer_groups=placed_groups(parallel, config, VOCAB))
  layout = make_layout(parallel)
  gradients = sharded_gradients(decoder, num_micro, context_of(decoder, parallel, layout))
  rows = jax.ShapeDtypeStruct((num_micro, LENGTH), "int32", sharding=layout.replicated)
  batch = dict.fromkeys(("ids", "labels", "position", "segment"), rows)
  run = jax.jit(lambda params, batch: gradients(params, batch, Keys.from_seed(0))[0])
  return run.lower(spread(decoder, layout), batch).compile()


def size(program):
  """Returns bytes of temporaries and the number of instructions."""
  text = program.as_text()
  return program.memory_analysis().temp_size_in_bytes, len(re.findall(r"^ +\S+ = ", text, re.M))


CASES = [
  *((name, "last") for name in ("interleaved", "zb_h1", "zb_v", "v_half", "dualpipe_v")),
  *((name, head) for name in ("1f1b", "zb_v") for head in ("one_barrier", "two_barriers")),
]


@pytest.mark.parametrize(
  "pipeline, head",
  [("1f1b", "last"), *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)],
)  # fmt: skip
def test_memory_and_instructions_do_not_grow_with_microbatches(pipeline, head):
  few, many = (size(compiled(pipeline, num_micro, head)) for num_micro in (4, 32))
  message, tokens = LENGTH * DIM * 4, 28 * LENGTH * 4 * 4
  assert many[0] - few[0] < message + tokens, (few, many)
  assert many[1] <= few[1] * 1.02, (few, many)


@pytest.mark.slow
def test_gpipe_keeps_the_input_of_every_microbatch():
  few, many = (size(compiled("gpipe", num_micro)) for num_micro in (4, 32))
  assert many[0] - few[0] > 28 * LENGTH * DIM * 4, (few, many)


@pytest.mark.parametrize("layers", [4, 12])
def test_a_forward_pass_over_stages_holds_a_layer_more_than_its_stage(layers):
  parallel = Parallel(pipe=2)
  config = TransformerConfig(dim=DIM, stack=(LayerGroup((WIDE,), layers),))
  decoder = Decoder(config, VOCAB, layer_groups=placed_groups(parallel, config, VOCAB))
  ids = jax.ShapeDtypeStruct((1, 8), "int32")
  program = jax.jit(decoder).lower(spread(decoder, make_layout(parallel)), ids).compile()
  layer = sum(
    leaf.size // leaf.shape[0] * 4 for leaf in jax.tree.leaves(decoder.shapes["stack"])
  )
  # On CPU a sum over devices has a copy of its input.
  assert program.memory_analysis().temp_size_in_bytes < 2.5 * layer
