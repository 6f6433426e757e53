"""What a program sends, by formulas, on a (2, 2, 2) mesh: kinds, axes, bytes, loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.hlo.compiled import collectives, collectives_of_text, flops, memory
from jaxmoe.hlo.dot_flops import dot_flops
from jaxmoe.hlo.replica_groups import connected_devices, mesh_axes, replica_groups
from jaxmoe.hlo.stablehlo import collectives_of_lowered
from jaxmoe.hlo.text import Instruction, parse_program

AXES = ("a", "b", "c")
X_BYTES = 16 * 8 * 4  # of the whole (16, 8) float32


def mesh_of(shape=(2, 2, 2), devices=None):
  devices = jax.devices()[:8] if devices is None else devices
  return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def lower(function, spec, out=None, mesh=None, dtype=jnp.float32):
  mesh = mesh or mesh_of()
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=spec, out_specs=spec if out is None else out, check_vma=False
  )
  x = jax.ShapeDtypeStruct((16, 8), dtype, sharding=NamedSharding(mesh, spec))
  return jax.jit(mapped).lower(x)


def looped(function, length):
  return lambda x: jax.lax.scan(lambda x, _: (function(x), None), x, None, length=length)[0]


def psum_b(x):
  return jax.lax.psum(x, "b")


# name: (function, spec in, spec out, kind, axes, bytes out, wire bytes, times)
CASES = {
  "all-reduce": (psum_b, P("b"), P(), "all-reduce", ("b",), X_BYTES / 2, X_BYTES / 2, 1),
  "all-reduce over two axes": (
    lambda x: jax.lax.psum(x, ("c", "a")), P(("a", "c")), P(),
    "all-reduce", ("a", "c"), X_BYTES / 4, 2 * 3 / 4 * X_BYTES / 4, 1,
  ),
  "all-reduce over all axes": (
    lambda x: jax.lax.psum(x, AXES), P(AXES), P(),
    "all-reduce", AXES, X_BYTES / 8, 2 * 7 / 8 * X_BYTES / 8, 1,
  ),
  "reduce-scatter": (
    lambda x: jax.lax.psum_scatter(x, "c", tiled=True), P(), P("c"),
    "reduce-scatter", ("c",), X_BYTES / 2, X_BYTES / 2, 1,
  ),
  "reduce-scatter over two axes": (
    lambda x: jax.lax.psum_scatter(x, ("b", "c"), tiled=True), P(), P(("b", "c")),
    "reduce-scatter", ("b", "c"), X_BYTES / 4, 3 * X_BYTES / 4, 1,
  ),
  "all-gather": (
    lambda x: jax.lax.all_gather(x, "a", tiled=True), P("a"), P(),
    "all-gather", ("a",), X_BYTES, X_BYTES / 2, 1,
  ),
  "all-gather in transposed order of axes": (
    lambda x: jax.lax.all_gather(x, ("c", "a"), tiled=True), P(("c", "a")), P(),
    "all-gather", ("a", "c"), X_BYTES, 3 / 4 * X_BYTES, 1,
  ),
  "all-to-all": (
    lambda x: jax.lax.all_to_all(x, "a", 0, 1, tiled=True), P("a"), P(None, "a"),
    "all-to-all", ("a",), X_BYTES / 2, X_BYTES / 4, 1,
  ),
  "all-to-all over two axes": (
    lambda x: jax.lax.all_to_all(x, ("a", "b"), 0, 1, tiled=True), P(("a", "b")), P(None, AXES[:2]),
    "all-to-all", ("a", "b"), X_BYTES / 4, 3 / 4 * X_BYTES / 4, 1,
  ),
  "collective-permute": (
    lambda x: jax.lax.ppermute(x, "b", [(0, 1), (1, 0)]), P("b"), P("b"),
    "collective-permute", ("b",), X_BYTES / 2, X_BYTES / 2, 1,
  ),
  "collective-permute that is no ring": (
    lambda x: jax.lax.ppermute(x, ("b", "c"), [(0, 1), (1, 2), (2, 3)]), P("b"), P("b"),
    "collective-permute", ("b", "c"), X_BYTES / 2, X_BYTES / 2, 1,
  ),
  "in a loop": (looped(psum_b, 5), P("b"), P("b"), "all-reduce", ("b",), 256, 256, 5),
  "in a loop in a loop": (
    looped(lambda x: 2 * looped(psum_b, 3)(x), 5), P("b"), P("b"),
    "all-reduce", ("b",), 256, 256, 15,
  ),
  "in a loop that does not start at 0": (
    lambda x: jax.lax.fori_loop(2, 9, lambda i, x: psum_b(x), x), P("b"), P("b"),
    "all-reduce", ("b",), 256, 256, 7,
  ),
}  # fmt: skip


def test_a_ragged_all_to_all_is_read_before_it_is_compiled():
  def swap(x):
    each = jnp.arange(2, dtype=jnp.int32)
    return jax.lax.ragged_all_to_all(x, x, each, each, each, each, axis_name="b")

  (one,) = read(lower(looped(swap, 3), P()), mesh_of(), compiled=False)
  assert (one.kind, one.axes, one.dtype) == ("ragged-all-to-all", ("b",), "f32")
  assert (one.bytes_out, one.wire_bytes, one.times) == (X_BYTES, X_BYTES / 2, 3)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "lowered"])
@pytest.mark.parametrize("name", CASES)
def test_a_collective_is_read_with_its_axes_bytes_and_times(name, compiled):
  function, spec, out, kind, axes, bytes_out, wire, times = CASES[name]
  lowered = lower(function, spec, out)
  found = read(lowered, mesh_of(), compiled)
  assert len(found) == 1
  one = found[0]
  assert (one.kind, one.axes, one.dtype) == (kind, axes, "f32")
  assert (one.bytes_out, one.wire_bytes, one.times) == (bytes_out, wire, times)
  assert one.known and not one.sometimes
  assert one.group_size == 2 ** len(axes)
  assert one.total_wire_bytes == times * wire


def read(lowered, mesh, compiled):
  return collectives(lowered.compile(), mesh) if compiled else collectives_of_lowered(lowered, mesh)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "lowered"])
def test_a_loop_of_unknown_length_counts_once_and_says_so(compiled):
  def function(x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, psum_b, x)

  (one,) = read(lower(function, P("b")), mesh_of(), compiled)
  assert (one.times, one.known) == (1, False)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "lowered"])
def test_a_collective_of_a_branch_is_told_as_such(compiled):
  def function(x):
    return jax.lax.cond(jnp.sum(x) > 0, psum_b, lambda x: x, x)

  (one,) = read(lower(function, P("b")), mesh_of(), compiled)
  assert one.sometimes and one.times == 1


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "lowered"])
@pytest.mark.parametrize("remat, gathers", [(True, 2), (False, 1)])
def test_what_is_gathered_again_for_the_backward_pass_counts_twice(remat, gathers, compiled):
  def layer(x):
    y_full = jnp.sin(jax.lax.all_gather(x, "b", tiled=True))
    return jax.lax.psum_scatter(jnp.sin(y_full), "b", tiled=True)

  function = jax.grad(lambda x: jnp.sum(looped(jax.checkpoint(layer) if remat else layer, 5)(x)))
  found = read(lower(function, P("b")), mesh_of(), compiled)
  times = {
    kind: sum(one.times for one in found if one.kind == kind)
    for kind in ("all-gather", "reduce-scatter")
  }
  # Each is the transpose of the other.
  assert times == {"all-gather": 5 * (gathers + 1), "reduce-scatter": 5 * 2}


def test_bfloat16_is_true_to_its_width_before_it_is_compiled():
  lowered = lower(psum_b, P("b"), dtype=jnp.bfloat16)
  (before,), (after,) = (read(lowered, mesh_of(), compiled) for compiled in (False, True))
  assert (before.dtype, before.bytes_out) == ("bf16", X_BYTES / 4)
  assert (after.dtype, after.bytes_out) == ("f32", X_BYTES / 2)  # XLA on CPU widens it


def test_axes_are_those_of_the_mesh_whatever_the_order_of_its_devices():
  mesh = mesh_of(devices=jax.devices()[:8][::-1])
  order = [5, 2, 7, 0, 3, 6, 1, 4]
  shuffled = mesh_of(devices=[jax.devices()[i] for i in order])
  for one in (mesh, shuffled):
    (found,) = collectives(lower(psum_b, P("b"), P(), mesh=one).compile(), one)
    assert found.axes == ("b",)


def test_an_axis_of_one_device_is_not_named():
  mesh = mesh_of((2, 1, 4))
  (found,) = collectives(
    lower(lambda x: jax.lax.psum(x, ("a", "b")), P(("a", "b")), P(), mesh=mesh).compile(), mesh
  )
  assert found.axes == ("a",)


def test_groups_that_are_no_product_of_axes_are_told_by_their_devices():
  assert mesh_axes(((0, 3), (1, 2)), mesh_of()) is None
  assert mesh_axes(((0, 1, 2), (3,)), mesh_of()) is None
  assert mesh_axes(((0, 1), (2, 4)), mesh_of()) is None
  assert mesh_axes(((0, 1), (2, 3), (4, 6), (5, 7)), mesh_of()) is None  # some over c, some over b
  assert mesh_axes(((0,), (1,)), mesh_of()) == ()


def test_pairs_are_chained_into_the_sets_they_connect():
  assert connected_devices(((0, 1), (2, 3), (3, 0), (5, 6))) == ((0, 1, 2, 3), (5, 6))


def test_products_count_as_often_as_their_loop_runs():
  def loss(weights, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
    return jnp.sum(x)

  weights = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
  found = flops(jax.jit(jax.grad(loss)).lower(weights, x).compile())
  assert found.matmul == 5 * 3 * 2 * 64 * 32 * 32
  assert found.unknown_loops == 0
  assert found.compiler < found.matmul  # XLA counts the body of a loop once


def test_products_of_batches_and_loops_of_unknown_length_are_told_apart():
  def function(x, y):
    z = jnp.einsum("ecd,edf->ecf", x, y)
    return jax.lax.while_loop(lambda z: jnp.sum(z) < 1, lambda z: z @ z[0].T @ z[0], z)

  x, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 64, 32), (8, 32, 16)))
  found = flops(jax.jit(function).lower(x, y).compile())
  assert found.matmul == 2 * 8 * 64 * 32 * 16
  assert found.unknown_loops == 2 * (2 * 8 * 64 * 64 * 16)


@pytest.mark.parametrize(
  "left, right, out, attributes, adds",
  [
    ("64,32", "32,16", "64,16", "dim_labels=bf_io->bf", 64 * 32 * 16),
    ("32,64", "16,32", "64,16", "dim_labels=fb_oi->bf", 64 * 32 * 16),
    # A batch of 4 products, as XLA for TPU writes it.
    (
      "4,64,32", "4,32,16", "4,64,16",
      "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf", 4 * 64 * 32 * 16,
    ),
    # A filter of 3 over 8 places: two of its products fall on padding.
    (
      "2,8,5", "3,5,7", "2,8,7",
      "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * (8 * 3 - 2) * 5 * 7,
    ),
  ],
)  # fmt: skip
def test_products_written_as_convolutions_count_what_they_multiply(
  left, right, out, attributes, adds
):
  text = (
    "ENTRY %main (x: f32[1]) -> f32[1] {\n"
    f"  %x = f32[{left}] parameter(0)\n"
    f"  %y = f32[{right}] parameter(1)\n"
    f"  ROOT %z = f32[{out}] convolution(%x, %y), {attributes}\n"
    "}\n"
  )
  computation = parse_program(text).computations["main"]
  assert dot_flops(computation["z"], computation) == 2 * adds


def test_memory_of_arguments_and_outputs_is_one_devices_shards():
  def function(x, y):
    return x + 1, y @ y.T

  mesh = mesh_of()
  x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, P(("a", "b"))))
  y = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, P()))
  shardings = (x.sharding, NamedSharding(mesh, P("c")))
  compiled = jax.jit(function, donate_argnums=0, out_shardings=shardings).lower(x, y).compile()
  found = memory(compiled)
  assert found.arguments == X_BYTES // 4 + X_BYTES
  assert found.aliased == X_BYTES // 4
  # XLA counts the table of a tuple's pointers too, eight bytes each.
  assert found.outputs == X_BYTES // 4 + 16 * 16 * 4 // 2 + 2 * 8
  assert found.peak >= found.arguments + found.outputs - found.aliased + found.temporaries


NOTATIONS = {
  "{{0,4},{1,5},{2,6},{3,7}}": [[0, 4], [1, 5], [2, 6], [3, 7]],
  "{}": [[0, 1, 2, 3, 4, 5, 6, 7]],
  "[4,2]<=[2,4]T(1,0)": [[0, 4], [1, 5], [2, 6], [3, 7]],
  "mesh['a'=2,'b'=4] {'a'}": [[0, 4], [1, 5], [2, 6], [3, 7]],
  "mesh['a'=2,'b'=2,'c'=2] {'c','a'}": [[0, 4, 1, 5], [2, 6, 3, 7]],
  "mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}": [[0, 1, 2, 3], [4, 5, 6, 7]],
  "mesh['a'=4,'b'=2], device_ids=(7,6,5,4,3,2,1,0) {'b'}": [[7, 6], [5, 4], [3, 2], [1, 0]],
  "mesh['a'=8] {'a':(1)2}": [[0, 4], [1, 5], [2, 6], [3, 7]],
  "mesh['a'=8] {'a':(2)2}": [[0, 2], [1, 3], [4, 6], [5, 7]],
}


@pytest.mark.parametrize("text", NOTATIONS)
def test_groups_are_read_in_every_notation(text):
  attributes = f", channel_id=1, replica_groups={text}, use_global_device_ids=true"
  found = replica_groups(Instruction("x", (), "all-reduce", "%y", attributes), 8)
  assert [list(group) for group in found] == NOTATIONS[text]


def test_a_notation_that_is_not_known_is_not_taken_for_another():
  with pytest.raises(ValueError, match="not known"):
    replica_groups(Instruction("x", (), "all-reduce", "%y", ", replica_groups=<odd>"), 8)


TEXT = """HloModule made_up, is_scheduled=true

%region (arg: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %arg = (s32[]{:T(128)}, f32[4,2]{1,0:T(8,128)}) parameter(0)
  %one = s32[] constant(1)
  %at = s32[] get-tuple-element(%arg), index=0
  %next = s32[] add(%at, %one)
  %x = f32[4,2]{1,0:T(8,128)S(1)} get-tuple-element(%arg), index=1
  %sum = f32[4,2]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], /*index=1*/f32[4,2]{1,0}) tuple(%next, %sum)
}

%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %both.1 = f32[] add(%l, %r)
}

%below (arg.1: (s32[], f32[4,2])) -> pred[] {
  %arg.1 = (s32[], f32[4,2]{1,0}) parameter(0)
  %limit = s32[] constant(9)
  %at.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%at.1, %limit), direction=LT
}

%wrapped (p: f32[4,2]) -> f32[1,2] {
  %p = f32[4,2]{1,0} parameter(0)
  ROOT %rs = f32[1,2]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[2,2,2]T(1,0,2), dimensions={0}
}

ENTRY %main (y: f32[4,2]) -> f32[4,2] {
  %y = f32[4,2]{1,0} parameter(0)
  %two = s32[] constant(2)
  %both = (s32[], f32[4,2]{1,0}) tuple(%two, %y)
  %while = (s32[], f32[4,2]{1,0}) while(%both), condition=%below, body=%region
  %z = f32[4,2]{1,0} get-tuple-element(%while), index=1
  %begin = (f32[4,2]{1,0}, f32[8,2]{1,0}) all-gather-start(%z), replica_groups=[4,2]<=[2,4]T(1,0)
  %end = f32[8,2]{1,0} all-gather-done(%begin)
  %sent = (s8[4], s8[4], u32[]) collective-permute-start(%y), source_target_pairs={{0,3},{3,0}}
  %got = s8[4]{0} collective-permute-done(%sent)
  %async = ((f32[4,2]), f32[1,2], s32[]) async-start(%z), calls=%wrapped
  %step = ((f32[4,2]), f32[1,2], s32[]) async-update(%async), calls=%wrapped
  %done = f32[1,2]{1,0} async-done(%step), calls=%wrapped
  %rows = bf16[16,2]{1,0} ragged-all-to-all(%y), replica_groups={}
  ROOT %copy = f32[4,2]{1,0} copy(%z)
}
"""


def test_every_notation_of_groups_ends_and_loops_is_read():
  found = collectives_of_text(TEXT, mesh_of())
  told = [(one.kind, one.axes, one.dtype, one.bytes_out, one.times) for one in found]
  assert told == [
    ("all-reduce", ("b", "c"), "f32", 32, 7),  # XLA for TPU leaves it to us to count 2 .. 8
    ("all-gather", ("a",), "f32", 64, 1),
    ("collective-permute", None, "s8", 4, 1),  # of one pair alone
    ("reduce-scatter", ("a", "c"), "f32", 8, 1),
    ("ragged-all-to-all", AXES, "bf16", 64, 1),
  ]
  assert all(one.known for one in found)
  assert found[2].over == "devices 0,3"


@pytest.mark.parametrize(
  "old, new",
  [
    ("index=0\n  ROOT %less", "index=1\n  ROOT %less"),  # another element is looked at
    ("%next = s32[] add(%at, %one)", "%next = s32[] add(%at, %at)"),
    ("%one = s32[] constant(1)", "%one = s32[] constant(2)"),
    ("direction=LT", "direction=NE"),
    ("tuple(%two, %y)", "tuple(%y, %y)"),
  ],
)
def test_a_loop_whose_counter_is_not_plain_is_of_unknown_length(old, new):
  assert TEXT.count(old) == 1
  first = collectives_of_text(TEXT.replace(old, new), mesh_of())[0]
  assert (first.times, first.known) == (1, False)
