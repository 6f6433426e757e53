"""Stages that keep residuals: nothing is made twice, and no weight lies in a slot."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from jaxmoe.core.rng import Keys
from jaxmoe.hlo.compiled import flops
from jaxmoe.hlo.dot_flops import dot_flops
from jaxmoe.hlo.text import parse_program
from jaxmoe.hlo.trip_counts import visits
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig, MoEConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.parallel import Parallel, make_layout, tick_scan
from jaxmoe.parallel.pipelines import lower
from jaxmoe.parity.cells import AGAIN, table_with_again
from jaxmoe.train import pipeline_gradients
from jaxmoe.train.gradients import make_gradients
from jaxmoe.train.pipeline_stages import placed_groups, table_of
from jaxmoe.train.pipeline_step import PipelineStep
from jaxmoe.train.sharded_gradients import context_of, sharded_gradients
from tests.multidevice.pipeline_memory_test import size, spread

VOCAB, LENGTH, DIM, MICRO, DEVICES = 32, 64, 32, 4, 4
BLOCK = BlockConfig(SoftmaxAttention(2, 1, 8), MLPConfig(48))
CONFIG = TransformerConfig(dim=DIM, stack=(LayerGroup((BLOCK,), 8),))
ROUTED = BlockConfig(SoftmaxAttention(2, 1, 8), MoEConfig(4, 2, experts=SwiGLU(mlp_dim=24)))
MOE = TransformerConfig(dim=DIM, stack=(LayerGroup((ROUTED,), 8),))
KEPT = Parallel(pipe=DEVICES, keep="residuals")
LAYOUTS = {
  "dense": (KEPT, CONFIG),
  "made again": (Parallel(pipe=2, pipeline=AGAIN), CONFIG),
  "cast weights": (KEPT, dataclasses.replace(CONFIG, dtype="bfloat16")),
  "gathered weights": (dataclasses.replace(KEPT, pipe=2, fsdp=2), CONFIG),
  "parts of weights": (dataclasses.replace(KEPT, pipe=2, tensor=2), CONFIG),
  "weights put off": (dataclasses.replace(KEPT, pipeline="zb_h1"), CONFIG),
  "experts": (KEPT, MOE),
}
NAMES = ("ids", "labels", "position", "segment")


def lowered(parallel, rows=1, config=CONFIG, num_micro=MICRO):
  decoder = Decoder(config, VOCAB, layer_groups=placed_groups(parallel, config, VOCAB))
  layout = make_layout(parallel)
  gradients = sharded_gradients(decoder, num_micro, context_of(decoder, parallel, layout))
  rows = num_micro * rows * parallel.num_row_groups
  shape = jax.ShapeDtypeStruct((rows, LENGTH), "int32", sharding=layout.replicated)
  run = jax.jit(lambda params, batch: gradients(params, batch, Keys.from_seed(0))[0])
  return run.lower(spread(decoder, layout), dict.fromkeys(NAMES, shape))


def flops_of_passes(parallel, monkeypatch):
  """Returns the FLOPs of products in the passes of all devices, by what each branch has."""
  seen = []

  def watched(columns, axis, passes, which_PK, *rest):
    seen.append(which_PK)
    return scan_ticks(columns, axis, passes, which_PK, *rest)

  scan_ticks = pipeline_gradients.scan_ticks
  monkeypatch.setattr(pipeline_gradients, "scan_ticks", watched)
  program = parse_program(lowered(parallel).compile().as_text())
  monkeypatch.undo()
  called = [
    one.called("branch_computations") for of in program.computations.values() for one in of.values()
  ]
  (which_PK,) = seen
  (branches,) = [names for names in called if len(names) == which_PK.max() + 1 > 2]
  each = [
    sum(seen.times * dot_flops(seen.instruction, seen.computation) for seen in visits(of))
    for of in (dataclasses.replace(program, entry=name) for name in branches)
  ]
  return int(np.array(each)[which_PK].sum())


def flops_of_one_device():
  decoder = Decoder(CONFIG, VOCAB)
  shape = jax.ShapeDtypeStruct((MICRO, LENGTH), "int32")
  run = jax.jit(functools.partial(make_gradients(decoder, MICRO), keys=Keys.from_seed(0)))
  return flops(run.lower(decoder.shapes, dict.fromkeys(NAMES, shape)).compile()).matmul


def slots_of(parallel, monkeypatch, rows=1, config=CONFIG):
  """Returns the shapes of what a slot has, by stage, its bytes, and how many slots are made."""
  seen, states = [], []
  slot_of, empty_slots = PipelineStep.kept_slot, tick_scan.empty_slots

  def watched(self):
    slot = slot_of(self)
    if self.kept:
      seen.append(([of.shapes for of in self.kept.values()], slot.shapes()))
    return slot

  def emptied(count, leaf):
    states.append((leaf.shape, count))
    return empty_slots(count, leaf)

  monkeypatch.setattr(PipelineStep, "kept_slot", watched)
  monkeypatch.setattr(tick_scan, "empty_slots", emptied)
  lowered(parallel, rows, config)
  monkeypatch.undo()
  shapes, slot = seen[-1]
  counts = {count for shape, count in states if shape in {of.shape for of in slot.values()}}
  return shapes, sum(map(num_bytes, slot.values())), counts


def num_bytes(shape):
  return math.prod(shape.shape) * shape.dtype.itemsize


def test_passes_that_keep_residuals_make_nothing_twice(monkeypatch):
  """All devices' products are those of one device; with inputs kept all stages but the last again.

  Of 8 layers on 4 devices 6 are made again: of 3 forward passes' worth a layer and head 4.
  """
  one = flops_of_one_device()
  assert flops_of_passes(KEPT, monkeypatch) == one
  again = Parallel(pipe=DEVICES, pipeline=table_with_again(DEVICES, MICRO))
  layers = one - 3 * 2 * MICRO * LENGTH * DIM * VOCAB
  made_again = layers / 3 * 6 / 8
  for parallel in (dataclasses.replace(KEPT, keep="input"), again):
    assert flops_of_passes(parallel, monkeypatch) == pytest.approx(one + made_again, rel=1e-9)


@pytest.mark.parametrize(
  "name",
  ["dense", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "dense")],
)
def test_slots_have_what_tokens_make_and_no_weights(name, monkeypatch):
  """Twice the tokens take twice the bytes, to the byte, and a slot is as large as its arrays."""
  parallel, config = LAYOUTS[name]
  shapes, one, counts = slots_of(parallel, monkeypatch, 1, config)
  last = jax.ShapeDtypeStruct((LENGTH, config.dim), config.dtype)  # the gradient of its output
  stages = [*shapes[:-1], [*shapes[-1], last]]
  by_dtype = [{of.dtype: 0 for stage in stages for of in stage} for _ in stages]
  for total, stage in zip(by_dtype, stages, strict=True):
    for of in stage:
      total[of.dtype] += num_bytes(of)
  assert one == sum(max(total[dtype] for total in by_dtype) for dtype in by_dtype[0])
  table = table_of(parallel, MICRO)
  assert counts == {lower(table, parallel.keep).slots.kept}
  stack = jax.tree.leaves(Decoder(config, VOCAB).shapes["stack"])
  matrices = {leaf.shape[1:] for leaf in stack if leaf.ndim > 2}
  assert not {of.shape[1:] for stage in shapes for of in stage} & matrices
  if name != "experts":  # whose rows have room for a number that is no multiple
    more = [slots_of(parallel, monkeypatch, rows, config)[1] for rows in (2, 4)]
    assert more == [2 * one, 4 * one]


def test_slots_do_not_grow_with_microbatches():
  few, many = (size(lowered(KEPT, num_micro=num).compile()) for num in (6, 24))
  tokens = 18 * LENGTH * 4 * 4
  assert many[0] - few[0] < LENGTH * DIM * 4 + tokens, (few, many)
  assert many[1] <= few[1] * 1.02, (few, many)
