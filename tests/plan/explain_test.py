"""What explain tells of a run equals what its arrays, its layout and its compiler say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.core.backends import Choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import Layout, one_device
from jaxmoe.hlo.compiled import Collective
from jaxmoe.optim import Masters
from jaxmoe.parallel import make_layout
from jaxmoe.plan import explain, explain_text
from jaxmoe.plan.activations import kept_bytes
from jaxmoe.plan.explain import compile_for, traffic, unread_bytes
from jaxmoe.plan.explain_text import size
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.train_state import StateSpec

AXES = ("data", "expert", "tensor")
RULES = {"expert": ("expert",), "mlp": ("tensor",)}
BATCH = ("data", "expert")


def recipe(*changes, names=""):
  small = ("train.batch_size=8", "data.seq_len=16", *changes)
  return load_recipe(f"configs/tiny.py{names}", [f"--config.{change}" for change in small])


def layout_of(rules=RULES):
  devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
  mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
  return Layout(mesh, {"params": rules, "optimizer": rules, "activations": {"batch": BATCH}})


@pytest.fixture(scope="module")
def spread():
  """What is told of a step that is compiled for eight devices."""
  return explain(recipe(), layout_of())


@pytest.fixture(scope="module")
def alone():
  """The same on one device."""
  return explain(recipe(), one_device())


def test_what_a_step_is_given_is_what_the_compiler_counts_on_one_device_and_on_eight(
  alone, spread
):
  for found in (alone, spread):
    assert found.arguments == found.compiled.memory.arguments + found.compiled.unread
  assert alone.arguments == sum(held.whole for held in spread.held.values()) > spread.arguments


def test_a_kernel_that_nobody_has_measured_is_told(alone):
  assert "not measured" not in explain_text(alone)
  chosen = Choice("grouped_matmul", "mosaic_tpu", "asked for")
  text = explain_text(dataclasses.replace(alone, kernels=(*alone.kernels, chosen)))
  assert "grouped_matmul: mosaic_tpu (asked for)\n" in text
  assert text.count("  grouped_matmul: mosaic_tpu ") == 2


def test_what_a_program_never_reads_is_counted_apart():
  sharding = NamedSharding(layout_of().mesh, P("data"))
  given = {
    name: jax.ShapeDtypeStruct((size,), jnp.float32, sharding=sharding)
    for name, size in (("read", 8), ("unread", 64))
  }
  compiled = jax.jit(lambda given: given["read"] + 1).lower(given).compile()
  assert unread_bytes(compiled, (given,)) == 64 * 4 // 2
  assert compiled.memory_analysis().argument_size_in_bytes == 8 * 4 // 2


def test_the_bytes_of_a_parameter_are_those_of_its_shard_of_real_arrays(spread):
  experiment, layout = recipe(), layout_of()
  decoder = experiment.decoder()
  spec = StateSpec(decoder, experiment.transform(decoder), layout, 128)
  params = spec.init(0).params
  shards = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)]
  assert [weight.bytes for weight in spread.weights] == shards
  assert sum(shards) == spread.held["parameters"].bytes
  assert [weight.whole for weight in spread.weights] == [
    leaf.nbytes for leaf in jax.tree.leaves(params)
  ]


def test_parameters_take_what_their_masters_do_and_a_file_what_it_holds(alone):
  assert alone.file == alone.held["parameters"] and "in a file" not in explain_text(alone)
  changes = ("model.param_dtype=bfloat16", "optim.frozen=embed/*")
  found = explain(recipe(*changes), one_device(), compiles=False)
  table = recipe().model.dim * 257
  assert found.file.whole == 2 * recipe().decoder().num_params
  assert found.held["parameters"].whole == 2 * found.file.whole - 2 * table
  assert found.held["optimizer"] == alone.held["optimizer"]
  (line,) = (line for line in explain_text(found).splitlines() if "in a file" in line)
  assert line.split()[-2:] == size(found.file.whole).split()
  halved = explain(recipe("optim.master_dtype=bfloat16"), one_device(), compiles=False)
  assert 2 * halved.held["parameters"].whole == halved.file.whole


def test_a_parameter_is_told_with_its_layers_dims_and_axes(spread):
  down = next(weight for weight in spread.weights if weight.name.endswith("experts/down"))
  assert down.name == "layers/0,1/moe/experts/down"
  assert down.dims == ("layer", "expert", "mlp", "embed")
  assert down.axes == ((), ("expert",), ("tensor",), ())
  assert down.whole == 4 * down.bytes == 2 * 4 * 32 * 32 * 4


@pytest.mark.parametrize(
  "repeats, name", [(1, "layers/0"), (2, "layers/0,1"), (5, "layers/0..4")]
)
def test_layers_that_are_stacked_have_one_line(repeats, name):
  experiment = recipe(f"model.stack.0.repeats={repeats}")
  found = explain(experiment, one_device(), compiles=False)
  assert any(weight.name.startswith(f"{name}/moe/") for weight in found.weights)
  assert found.compiled is None


def test_layers_that_alternate_are_told_by_their_first_two_and_the_last():
  experiment = recipe()
  (group,) = experiment.model.stack
  group = dataclasses.replace(group, pattern=group.pattern * 2, repeats=3)
  model = dataclasses.replace(experiment.model, stack=(group,))
  found = explain(dataclasses.replace(experiment, model=model), one_device(), compiles=False)
  names = {weight.name for weight in found.weights}
  assert {"layers/0,2..4/moe/experts/down", "layers/1,3..5/moe/experts/down"} <= names


def test_gradients_of_a_batch_that_is_spread_are_summed_over_its_axes(alone, spread):
  kinds = {(one.kind, one.over) for one in spread.compiled.traffic}
  assert any(kind == "all-reduce" and "data" in over for kind, over in kinds)
  assert alone.compiled.traffic == ()


def test_flops_of_the_compiled_step_are_those_of_the_model_where_nothing_is_done_twice():
  # All experts are active: what differs is how attention's products are counted.
  changes = ("model.stack.0.pattern.0.ffn.num_experts=2", "model.loss_chunk=128")
  found = explain(recipe(*changes, names=":dispatch=dense"), one_device())
  assert 0.8 < found.compiled.flops.matmul / found.model_flops < 1.3


def test_full_remat_keeps_a_stream_a_layer_and_none_keeps_more():
  few, many, all_of_it = (
    kept_bytes(recipe(*changes).decoder(), Masters(), 8, 16)
    for changes in (
      ("model.remat=full", "model.stack.0.repeats=4"),
      ("model.remat=full", "model.stack.0.repeats=8"),
      ("model.stack.0.repeats=8",),
    )
  )
  stream = 8 * 16 * 32 * 4
  assert stream <= (many - few) / 4 < 1.1 * stream  # indices of layers and the like beside it
  assert all_of_it > 5 * many


def loads(experiment, layout):
  (experts,) = explain(experiment, layout, compiles=False).activations.experts
  return experts


def test_a_device_with_all_experts_has_all_choices_however_they_are_spread():
  found = loads(recipe(), one_device())
  assert [at.device_rows for at in found.loads] == [8 * 16 * 2] * 3
  assert [at.expert_rows for at in found.loads] == [64, 96, 128]
  assert [at.dispatch_bytes for at in found.loads] == [2 * 256 * 32 * 4] * 3
  assert found.loads[0].hidden_bytes == 256 * 3 * 32 * 4  # gate, up and what they make


def test_rows_of_the_busiest_device_grow_with_the_load_where_experts_are_spread():
  found = loads(recipe(), layout_of())
  # Two devices along expert hold 32 tokens each; a device has 2 of 4 experts and half the hidden.
  assert (found.experts_here, found.tokens) == (2, 64)
  assert [at.device_rows for at in found.loads] == [64, 96, 128]
  assert found.loads[2].hidden_bytes == 128 * 3 * 16 * 4


def test_a_fixed_capacity_drops_instead_of_growing():
  experiment = recipe(names=":dispatch=capacity")
  factor = experiment.model.stack[0].pattern[0].ffn.dispatch.factor
  found = loads(experiment, one_device())
  room = int(np.ceil(factor * 64))
  assert [at.device_rows for at in found.loads] == [4 * room] * 3
  assert [at.dropped for at in found.loads] == [max(n - room, 0) for n in (64, 96, 128)]


def test_every_device_that_sends_has_a_capacity_of_its_own():
  found = loads(recipe(names=":dispatch=capacity"), layout_of())
  room = 2 * int(np.ceil(1.25 * 32 * 2 / 4))  # of 32 tokens on each of two devices
  assert [at.device_rows for at in found.loads] == [2 * room] * 3
  assert [at.dropped for at in found.loads] == [max(n - room, 0) for n in (32, 48, 64)]


def test_dense_dispatch_computes_every_token_in_every_expert():
  found = loads(recipe(names=":dispatch=dense"), one_device())
  assert [at.device_rows for at in found.loads] == [4 * 128] * 3


def test_a_dim_that_does_not_divide_is_refused_in_one_line():
  with pytest.raises(InputError, match="'vocab' of size 257 does not divide by 2"):
    explain(recipe(), layout_of({**RULES, "vocab": ("tensor",)}), compiles=False)


def test_a_step_that_the_compiler_finds_too_large_is_one_line():
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 688G exceeds available HBM (15G).\nA")

  with pytest.raises(InputError, match=r"688G exceeds available HBM \(15G\); take more devices"):
    compile_for(Lowered())


@pytest.mark.parametrize("gigabytes, fits", [(None, None), (1e-6, False), (1, True)])
def test_what_fits_is_told_where_the_memory_of_a_device_is_known(alone, gigabytes, fits):
  room = None if gigabytes is None else int(gigabytes * 2**30)
  found = dataclasses.replace(alone, room=room)
  assert found.fits is fits
  assert ("it fits" in explain_text(found)) == (fits is True)
  assert ("it does not fit" in explain_text(found)) == (fits is False)


def test_collectives_alike_are_added_up_and_those_that_send_most_come_first():
  one = Collective("all-reduce", ("a",), ((0, 1),), (4,), "f32", 16, times=3)
  branch = dataclasses.replace(one, times=1, sometimes=True)
  other = Collective("all-gather", ("b",), ((0, 1, 2, 3),), (8,), "bf16", 1600, known=False)
  first, second = traffic([one, other, branch])
  assert (first.kind, first.count, first.wire_bytes, first.known) == ("all-gather", 1, 1200, False)
  assert (second.count, second.bytes_out, second.wire_bytes) == (4, 64, 64.0)
  assert second.sometimes and second.known and not first.sometimes


def test_the_page_fits_80_columns_and_the_record_is_json(spread):
  lines = explain_text(spread).splitlines()
  assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
  assert any("expert=expert" in line for line in lines)
  record = json.loads(json.dumps(spread.record()))
  compiled = record["compiled"]
  given = compiled["memory"]["arguments"] + compiled["unread"]
  assert given == record["arguments"] == spread.arguments


def test_shapes_of_public_models_are_told_without_allocating():
  experiment = load_recipe("configs/mixtral_8x7b.py", [])
  found = explain(experiment, one_device(), compiles=False)
  assert found.held["parameters"].whole == experiment.decoder().num_params * 4 > 180e9
  assert all(len(line) <= 80 for line in explain_text(found).splitlines())


def test_sizes_are_told_in_the_largest_unit_that_leaves_one():
  told = [size(number) for number in (0, 1023, 1024, 1.5 * 2**30)]
  assert told == ["0 B", "1023 B", "1.00 KiB", "1.50 GiB"]


def test_the_page_names_what_devices_hold_alike():
  experiment = recipe("parallel.tensor=2", "parallel.expert=2", names=":exchange=all_gather")
  found = explain(experiment, make_layout(experiment.parallel), compiles=False)
  largest = {one.axes: one for one in found.copies}
  assert set(largest) == {("tensor",), ("expert", "tensor")}
  gathered = largest["expert", "tensor"]
  assert gathered.bytes == 8 * 16 * experiment.model.dim * 4
  long = dataclasses.replace(gathered, scope="/".join(["experts"] * 12))
  lines = explain_text(dataclasses.replace(found, copies=(long, *found.copies))).splitlines()
  assert max(map(len, lines)) <= 80
  told = "".join("".join(lines).split())
  for one in (long, *found.copies):
    assert "".join(f"{one} {size(one.bytes)}".split()) in told
