"""Which dtype a parameter trains in, and how updates are added to bfloat16 ones."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.core.rng import Keys, name_hash
from jaxmoe.hlo.compiled import collectives
from jaxmoe.optim import Masters, apply_updates, frozen_masks, frozen_names
from jaxmoe.optim.rounding import draw_bits, round_by_chance

SPLITS = ((1, 3), (1, 1))  # three layers in one leaf, and one by itself
BF16, F32 = jnp.bfloat16, jnp.float32
Q, DOWN = "attention/q", "moe/experts/down"
DIMS = {
  "embed": {"table": ("vocab", "embed")},
  "stack": {
    s: {"0": {
      "attention": {"q": ("layer", "embed", "heads")},
      "moe": {
        "experts": {"down": ("layer", "expert", "mlp", "embed")},
        "router": {"buffers": {"bias": ("layer", None)}},
      },
    }}
    for s in "01"
  },
}  # fmt: skip


def tree(make):
  """Returns a tree of parameters of `make(path, shape)`."""
  return {
    "embed": {"table": make("embed/table", (8, 4))},
    "stack": {
      s: {"0": {
        "attention": {"q": make(f"stack/{s}/0/{Q}", (repeats, 4, 6))},
        "moe": {
          "experts": {"down": make(f"stack/{s}/0/{DOWN}", (repeats, 4, 6, 8))},
          "router": {"buffers": {"bias": make(f"stack/{s}/0/moe/router/buffers/b", (repeats, 4))}},
        },
      }}
      for s, repeats in (("0", 3), ("1", 1))
    },
  }  # fmt: skip


def declared(path, shape):
  return jax.ShapeDtypeStruct(shape, F32 if "/buffers/" in path else BF16)


def draw(path, shape, seed=0, scale=1.0):
  rng = np.random.default_rng([seed, *path.encode()])
  return jnp.asarray(scale * rng.normal(size=shape), F32)


def masters_of(dtype, *patterns):
  masks = frozen_masks(patterns, tree(declared), DIMS, SPLITS)
  return Masters(dtype, frozen_names(masks, SPLITS))


def test_what_trains_has_masters_and_what_is_frozen_the_dtype_it_came_in():
  masters = masters_of("float32", f"layers/*/{Q}", "embed/*", f"layers/*/{DOWN}@0:2")
  found = masters.shapes(tree(declared), SPLITS)
  assert found["embed"]["table"].dtype == BF16
  for s in "01":
    block = found["stack"][s]["0"]
    assert block["attention"]["q"].dtype == BF16
    assert block["moe"]["experts"]["down"].dtype == F32  # some of its experts train
    assert block["moe"]["router"]["buffers"]["bias"].dtype == F32


def test_layers_that_share_a_leaf_have_the_widest_dtype_in_memory_and_their_own_by_name():
  masters = masters_of("float32", f"layers/1/{Q}", f"layers/3/{Q}")
  assert masters.frozen == {f"layers/1/{Q}", f"layers/3/{Q}"}
  found = masters.shapes(tree(declared), SPLITS)["stack"]
  assert [found[s]["0"]["attention"]["q"].dtype for s in "01"] == [F32, BF16]
  assert [masters.of(f"layers/{at}/{Q}", BF16) for at in range(4)] == [F32, BF16, F32, BF16]


def test_experts_frozen_one_range_after_the_other_are_frozen_as_a_whole():
  masters = masters_of("float32", f"layers/2/{DOWN}@0:1", f"layers/2/{DOWN}@1:4")
  assert masters.frozen == {f"layers/2/{DOWN}"}


def test_what_is_frozen_is_of_the_dtype_its_file_has_whatever_the_model_says():
  masters = Masters(frozen=frozenset({"head/weight"}), came={"head/weight": "float16"})
  assert masters.of("head/weight", F32) == jnp.float16
  assert masters.of("embed/table", BF16) == F32


def test_bfloat16_masters_are_those_of_what_trains():
  masters = masters_of("bfloat16", "embed/*")
  assert masters.of(f"layers/0/{Q}", F32) == BF16
  assert masters.of("embed/table", F32) == F32
  assert masters.of("layers/0/moe/router/buffers/bias", F32) == F32


VALUES = (1.0, 1 + 2**-9, -1 - 2**-9, 1 + 2**-8, 1.9999999, 3.1415927, -1e-3, 1e-38, 1e-44, 0.0)


def neighbours(value):
  """Returns the bfloat16 numbers below and above, towards zero and away from it."""
  near = ml_dtypes.bfloat16(value)
  if float(near) == value:
    return value, value
  word = near.view(np.uint16)
  if abs(float(near)) > abs(value):
    word -= np.uint16(1)
  return tuple(float(np.uint16(w).view(ml_dtypes.bfloat16)) for w in (word, word + 1))


@pytest.mark.parametrize("value", VALUES)
def test_a_rounded_sum_is_one_of_two_neighbours_and_in_the_mean_itself(value):
  value = float(np.float32(value))
  every = jnp.arange(2**16, dtype=jnp.uint16)
  got = np.asarray(round_by_chance(jnp.full(2**16, value, F32), every), np.float64)
  assert set(got) <= set(neighbours(value))
  assert np.mean(got) == value  # over all bits there are, exactly


def test_what_is_not_finite_stays_and_nothing_becomes_it():
  most = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
  given = jnp.asarray([np.inf, -np.inf, np.nan, most], F32)
  got = np.asarray(round_by_chance(given, jnp.full(4, 2**16 - 1, jnp.uint16)), np.float32)
  np.testing.assert_array_equal(got, given)


def test_random_bits_are_those_of_seed_step_name_and_place_alone():
  keys = (Keys.from_seed(3) / "rounding").at(7)
  stacked = draw_bits(keys, f"stack/0/0/{DOWN}", (3, 4, 6, 8), SPLITS)
  key = jax.random.fold_in(keys.root, np.uint32(name_hash(f"layers/1/{DOWN}")))
  long = np.asarray(jax.random.bits(key, (1000,), jnp.uint16))
  np.testing.assert_array_equal(np.ravel(stacked[1]), long[: 4 * 6 * 8])
  assert long[:4].tolist() == [39773, 16900, 46370, 534]  # as this test printed them at first
  alone = draw_bits(keys, f"stack/0/1/{DOWN}", (3, 4, 6, 8), ((2, 3),))
  np.testing.assert_array_equal(alone[0], stacked[1])  # layer 1 of pairs of layers
  others = [
    draw_bits((Keys.from_seed(seed) / "rounding").at(step), f"stack/0/0/{leaf}", (3, 192), SPLITS)
    for seed, step, leaf in ((3, 7, Q), (3, 8, DOWN), (4, 7, DOWN))
  ]
  for other in others:
    assert np.mean(np.ravel(other) == np.ravel(stacked)) < 0.01


def test_the_mean_of_many_steps_is_the_sum_of_their_updates():
  params = {"embed": {"table": jnp.full((8, 512), 1.0, BF16)}}
  updates = {"embed": {"table": jnp.full((8, 512), 1e-4, F32)}}
  masters = Masters("bfloat16")

  @jax.jit
  def step(params, index):
    return apply_updates(masters, params, updates, Keys.from_seed(0).at(index), ()), None

  moved, _ = jax.lax.scan(step, params, jnp.arange(100))
  got = np.asarray(moved["embed"]["table"], np.float64) - 1
  # A step goes up by 2**-7 with probability 0.0128: a deviation of 8.8e-4, and 5.5e-5 of the mean
  # of 4,096 after a hundred.
  np.testing.assert_allclose(np.mean(got), 0.01, atol=5 * 1.4e-4)
  nearest = optax.apply_updates(params, updates)["embed"]["table"]
  assert np.all(np.asarray(nearest) == 1)  # where every one of them is lost


LAYOUTS = {
  "data": PartitionSpec(),
  "experts": PartitionSpec(None, "a"),
  "tensor": PartitionSpec(None, None, "a"),
  "zero": PartitionSpec(None, None, None, ("a", "b")),
  "experts and zero": PartitionSpec(None, ("a",), None, "b"),
}


def test_the_same_bits_come_out_wherever_parts_of_a_leaf_lie():
  masters, layer_groups = Masters("bfloat16"), ((1, 3),)
  path = f"stack/0/0/{DOWN}"
  params = {"stack": {"0": {"0": {"moe": {"experts": {"down": draw(path, (3, 4, 6, 8))}}}}}}
  params = jax.tree.map(lambda leaf: leaf.astype(BF16), params)
  updates = jax.tree.map(lambda leaf: draw(path, leaf.shape, 1, 1e-3), params)

  def apply(params, updates, index):
    keys = (Keys.from_seed(1) / "rounding").at(index)
    return apply_updates(masters, params, updates, keys, layer_groups)

  true = jax.tree.leaves(jax.jit(apply)(params, updates, 5))[0]
  moved = np.asarray(true) != np.asarray(jax.tree.leaves(params)[0])
  assert 0.05 < moved.mean() < 0.95
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
  for name, spec in LAYOUTS.items():
    lies = NamedSharding(mesh, spec)
    place = jax.tree.map(lambda leaf, lies=lies: jax.device_put(leaf, lies), (params, updates))
    compiled = jax.jit(apply, out_shardings=lies).lower(*place, 5).compile()
    got = jax.tree.leaves(compiled(*place, 5))[0]
    np.testing.assert_array_equal(got, true, err_msg=name)
    assert not collectives(compiled, mesh), name
