"""What a vocabulary over all devices sends and multiplies, read from the lowered program."""

import collections
import dataclasses
import re

import pytest

from jaxmoe.hlo.stablehlo import collectives_of_lowered
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.train.pipeline_stages import placed_groups
from jaxmoe.train.spread_head import STREAM_SUMS
from tests.multidevice.programs import lower_gradients

DIM, LENGTH, MICRO, DEVICES, VOCAB = 16, 8, 8, 4, 4096
STACK = (LayerGroup((BlockConfig(SoftmaxAttention(2, 1, 8), MLPConfig(32)),), 2 * DEVICES),)
CONFIG = TransformerConfig(dim=DIM, stack=STACK)
ALGORITHMS = {"two_barriers": 1, "one_barrier": 2}
_TENSOR = re.compile(r"tensor<([0-9x]+)xf32>")


def lowered(head):
  """Returns the program of gradients, and its mesh."""
  parallel = Parallel(pipe=DEVICES, head=head)
  decoder = Decoder(CONFIG, VOCAB, layer_groups=placed_groups(parallel, CONFIG, VOCAB))
  return lower_gradients(decoder, parallel, (MICRO, LENGTH), MICRO)


def sizes_of_products(program):
  """Returns the sizes of all dims of every product in a program's text."""
  lines = [line for line in program.as_text().splitlines() if "dot_general" in line]
  return [
    {int(dim) for dims in _TENSOR.findall(line) for dim in dims.split("x")} for line in lines
  ]


@pytest.mark.parametrize("head", ALGORITHMS)
def test_a_microbatch_sends_its_stream_and_some_numbers_a_token(head):
  shapes = collections.Counter(
    one.shape for one in collectives_of_lowered(*lowered(head)) if one.sometimes
  )
  stream, numbers = (1, LENGTH, DIM), (LENGTH,)
  assert shapes.keys() == {stream, numbers}  # of logits nothing is sent
  assert shapes[stream] == STREAM_SUMS[ALGORITHMS[head]]
  assert shapes[numbers] <= 8  # maximum, mass and right logit, and their gradients


@pytest.mark.parametrize("head", ALGORITHMS)
def test_a_device_multiplies_by_its_share_of_the_vocabulary_alone(head):
  sizes = sizes_of_products(lowered(head)[0])
  assert not any(VOCAB in dims for dims in sizes)
  shares = sum(VOCAB // DEVICES in dims for dims in sizes)
  # Logits and both gradients; logits once more where only their sums were kept.
  assert shares == {1: 4, 2: 3}[ALGORITHMS[head]]


def test_a_head_on_the_last_stage_multiplies_by_all_of_it():
  sizes = sizes_of_products(lowered("last")[0])
  assert sum(VOCAB in dims for dims in sizes) >= 3


def test_every_device_holds_as_many_rows_of_the_vocabulary():
  parallel = Parallel(pipe=2, tensor=2, head="one_barrier")
  groups = placed_groups(parallel, CONFIG, VOCAB)
  decoder = Decoder(dataclasses.replace(CONFIG, tied=True), VOCAB, layer_groups=groups)
  lies = make_layout(parallel).shardings("params", decoder.dims, decoder.shapes)["embed"]["table"]
  held = [rows.indices(VOCAB)[:2] for rows, _ in lies.devices_indices_map((VOCAB, DIM)).values()]
  assert sorted(held) == [(at * VOCAB // 4, (at + 1) * VOCAB // 4) for at in range(4)]
