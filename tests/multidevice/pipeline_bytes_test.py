"""What the permutes of a pipeline send, by direction: its ticks times a message, exactly."""

import collections

import pytest

from jaxmoe.hlo.stablehlo import collectives_of_lowered
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.parallel import Parallel
from jaxmoe.parallel.pipelines import PIPELINES, lower
from jaxmoe.plan.pipeline_summary import sent_bytes
from jaxmoe.train.pipeline_stages import placed_groups
from tests.multidevice.programs import lower_gradients

DIM, LENGTH, VOCAB, MICRO, DEVICES = 16, 8, 32, 8, 4
MESSAGE = 4 * LENGTH * DIM  # a row's residual stream
BLOCK = BlockConfig(SoftmaxAttention(2, 1, 8), MLPConfig(32))


def sent(pipeline):
  """Returns the bytes that a device sends to its neighbours, and how often."""
  parallel = Parallel(pipe=DEVICES, pipeline=pipeline)
  config = TransformerConfig(dim=DIM, stack=(LayerGroup((BLOCK,), 2 * DEVICES),))
  decoder = Decoder(config, VOCAB, layer_groups=placed_groups(parallel, config, VOCAB))
  lowered, mesh = lower_gradients(decoder, parallel, (MICRO, LENGTH), MICRO)
  total, times = collections.Counter(), collections.Counter()
  for one in collectives_of_lowered(lowered, mesh):
    if one.kind == "collective-permute":
      assert one.known and not one.sometimes and one.over == "pipe"
      ways = {(to - source) % DEVICES for source, to in one.pairs}
      assert len(one.pairs) == DEVICES and len(ways) == 1
      way = {1: "right", DEVICES - 1: "left"}[ways.pop()]
      total[way] += one.total_wire_bytes
      times[way] += one.times
  return dict(total), dict(times)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_permutes_send_a_message_a_tick_and_channel(pipeline):
  columns = lower(PIPELINES[pipeline](DEVICES, MICRO))
  total, times = sent(pipeline)
  channels = collections.Counter(one.route for one in columns.channels if one.route != "here")
  assert times == {way: number * columns.num_ticks for way, number in channels.items()}
  assert total == sent_bytes(columns, MESSAGE) == {way: n * MESSAGE for way, n in times.items()}
