"""What a device holds of the state, exactly, and of weights that it gathers: one layer."""

import collections

import pytest

from jaxmoe.hlo.compiled import collectives, memory
from jaxmoe.hlo.stablehlo import collectives_of_lowered
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.parallel import Parallel, mesh_context
from tests.multidevice.programs import compile_step, decoder_of, lower_gradients
from tests.parallel.scan_prefetch_test import plain_scan

ROWS, LENGTH, DIM, LAYERS, FLOAT = 8, 8, 64, 2, 4
HEADS = SoftmaxAttention(num_heads=4, num_kv_heads=4, head_dim=16)
MLP_BLOCK = BlockConfig(HEADS, MLPConfig(128))
MOE_BLOCK = BlockConfig(HEADS, MoEConfig(num_experts=4, experts=SwiGLU(32), balance=()))


def shared_params(shapes, ffn):
  """Returns the number of parameters that no expert holds."""
  vocab_size = shapes.params["embed"]["table"].shape[0]
  return 2 * vocab_size * DIM + DIM + LAYERS * (2 * DIM + 4 * DIM * DIM + ffn)


def beside(shapes, groups):
  """Returns bytes of what is no leaf's: counters, losses and norms of past steps, token arrays."""
  counters = 5  # of steps, skipped ones, those in a row, those without labels, values kept
  counts = 2  # of the optimizer's updates, and of the schedule's
  rows = 5 * ROWS // groups * LENGTH  # ids, labels, positions, segments; domains, though unused
  return FLOAT * (counters + counts + shapes.recent.values_2W.size + rows)


# stage: bytes a device holds of P float32 parameters and two moments, over n devices
HELD = {
  0: lambda size, n: FLOAT * 3 * size,
  1: lambda size, n: FLOAT * (size + 2 * size // n),
  2: lambda size, n: FLOAT * (size + 2 * size // n),
  3: lambda size, n: FLOAT * 3 * size // n,
}


@pytest.mark.parametrize("stage", [
  1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))
])  # fmt: skip
def test_a_step_is_given_the_state_of_its_stage_and_gathers_what_moved(stage):
  parallel = Parallel(fsdp=4, zero=stage)
  compiled, mesh, shapes = compile_step(MLP_BLOCK, LAYERS, DIM, parallel, (ROWS, LENGTH))
  size = shared_params(shapes, 3 * DIM * 128)
  assert memory(compiled).arguments == HELD[stage](size, 4) + beside(shapes, 4)
  if stage in (1, 2):
    total = collections.Counter()
    for one in collectives(compiled, mesh):
      total[one.kind] += one.total_wire_bytes
    # Gradients are scattered and new parameters gathered; beside them go single numbers.
    part = 3 / 4 * FLOAT * size
    assert total["reduce-scatter"] == total["all-gather"] == part
    assert total.total() == pytest.approx(2 * part, rel=1e-3)


def test_a_device_is_given_its_own_experts_and_shards_of_them():
  parallel = Parallel(fsdp=2, expert=2, zero=3)
  compiled, _, shapes = compile_step(MOE_BLOCK, LAYERS, DIM, parallel, (ROWS, LENGTH))
  shared, experts = shared_params(shapes, DIM * 4), LAYERS * 4 * 3 * DIM * 32
  held = HELD[3](shared, 2) + HELD[3](experts, 4)
  assert memory(compiled).arguments == held + beside(shapes, 4)


WIDE = BlockConfig(SoftmaxAttention(num_heads=4, num_kv_heads=4, head_dim=64), MLPConfig(512))
ONE_LAYER = FLOAT * (2 * 256 + 4 * 256 * 256 + 3 * 256 * 512)
TINY = (4, 2)  # two tokens a device: what is kept of them is little beside weights


def grows(dtype="float32"):
  """Returns by how much temporaries of a gradient grow with a layer, as a share of its weights."""
  sizes = []
  for layers in (4, 12):
    decoder = decoder_of(WIDE, layers, 256, 256, dtype=dtype)
    lowered, _ = lower_gradients(decoder, Parallel(fsdp=4), TINY)
    sizes.append(memory(lowered.compile()).temporaries)
  return (sizes[1] - sizes[0]) / (8 * ONE_LAYER)


def test_gathered_weights_are_not_kept_whatever_the_depth():
  assert grows() < 0.02


@pytest.mark.slow
def test_nor_are_their_casts_which_are_without_the_policy(monkeypatch):
  assert grows("bfloat16") < 0.02
  monkeypatch.setattr(mesh_context, "save_all_but_weights", lambda *_, **__: True)
  assert grows("bfloat16") > 0.4


@pytest.mark.slow
def test_a_plain_scan_would_keep_them(monkeypatch):
  monkeypatch.setattr(mesh_context, "scan_with_prefetch", plain_scan)
  assert grows() > 0.9


def test_layers_that_are_unrolled_ask_for_their_weights_again_too():
  decoder = decoder_of(WIDE, 4, 256, 256, scan=False)
  lowered, mesh = lower_gradients(decoder, Parallel(fsdp=4), TINY)
  found = collectives_of_lowered(lowered, mesh)
  gathers = sum(one.total_wire_bytes for one in found if one.kind == "all-gather")
  outside = FLOAT * (2 * 256 * 256 + 256)
  assert gathers == 3 / 4 * (2 * 4 * ONE_LAYER + outside)


def kept_of_a_layer(parallel):
  """Returns the bytes by which temporaries grow with a layer that is made again whole."""
  block = BlockConfig(SoftmaxAttention(num_heads=4, num_kv_heads=4, head_dim=8), MLPConfig(32))
  sizes = []
  for layers in (4, 12):
    decoder = decoder_of(block, layers, 64, 64, remat="full")
    lowered, _ = lower_gradients(decoder, parallel, (8, 128))
    sizes.append(memory(lowered.compile()).temporaries)
  return (sizes[1] - sizes[0]) / 8


STREAM = FLOAT * 8 * 128 * 64


def test_every_device_of_a_tensor_group_keeps_the_stream_between_layers():
  assert kept_of_a_layer(Parallel(tensor=4)) == pytest.approx(STREAM, rel=0.1)


@pytest.mark.parametrize("how", ["sequence", "partition_activations"])
def test_or_the_group_keeps_it_once(how):
  parallel = Parallel(tensor=4, **{how: True})
  assert kept_of_a_layer(parallel) == pytest.approx(STREAM / 4, rel=0.1)


def test_also_where_weights_arrive_ahead():
  less = Parallel(fsdp=2, tensor=4), Parallel(fsdp=2, tensor=4, partition_activations=True)
  all_of, parts = (kept_of_a_layer(parallel) for parallel in less)
  # Beside the stream of half the rows there are gradients of the weights.
  assert all_of - parts == pytest.approx(3 / 4 * STREAM / 2, rel=0.05)
