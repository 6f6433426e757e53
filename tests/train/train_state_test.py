import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint import MemoryStore, open_store
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import one_device
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder
from jaxmoe.optim import OPTIMIZERS, Constant, Masters, Optim, make_optimizer
from jaxmoe.train.train_state import (
  ONLY,
  PARAMS,
  StateSpec,
  abstract_params,
  came_from,
  params_from_arrays,
  read_params,
  read_state,
)

REPEATS = 4
SPLITS = {
  "scan": lambda block: (LayerGroup((block,), repeats=REPEATS),),
  "pairs": lambda block: (LayerGroup((block, block), repeats=REPEATS // 2),),
  "segments": lambda block: (LayerGroup((block,), repeats=1),) * REPEATS,
  "one and three": lambda block: (LayerGroup((block,), 1), LayerGroup((block,), 3)),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture(scope="module")
def spec_of(decoder_of):
  """Returns a function (optimizer, split, scan) -> the spec of a state."""
  made = {}

  def get(name, split="scan", scan=True):
    if (name, split, scan) not in made:
      decoder = decoder_of(stack=SPLITS[split], scan=scan)
      optim = Optim(OPTIMIZERS[name][1], Constant())
      transform = make_optimizer(optim, 5, decoder.parameter_names, decoder.dims)
      made[name, split, scan] = StateSpec(decoder, transform, one_device())
    return made[name, split, scan]

  return get


@pytest.fixture(scope="module")
def arrays_of(spec_of):
  """Returns a function from an optimizer to arrays of a state in which every number is another."""
  def get(name):
    rng = np.random.default_rng(0)
    return {
      path: jax.device_put(rng.integers(0, 2**20, leaf.shape).astype(leaf.dtype), leaf.sharding)
      for path, leaf in spec_of(name).abstract().items()
    }

  return get


def assert_equal(left, right):
  assert left.keys() == right.keys()
  for name, leaf in left.items():
    assert leaf.dtype == right[name].dtype
    np.testing.assert_array_equal(leaf, right[name], err_msg=name)


@optimizers
def test_from_arrays_undoes_to_arrays(spec_of, arrays_of, name):
  spec, arrays = spec_of(name), arrays_of(name)
  state = spec.from_arrays(arrays)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, spec.shapes)
  assert jax.tree.structure(state) == jax.tree.structure(spec.shapes)
  assert_equal(spec.to_arrays(state), arrays)


@optimizers
def test_like_says_what_to_arrays_gives(spec_of, arrays_of, name):
  spec = spec_of(name)
  arrays, like = spec.to_arrays(spec.from_arrays(arrays_of(name))), spec.abstract()
  assert arrays.keys() == like.keys()
  for path, leaf in arrays.items():
    assert (leaf.shape, leaf.dtype) == (like[path].shape, like[path].dtype)
    assert leaf.sharding.is_equivalent_to(like[path].sharding, leaf.ndim)


@optimizers
@pytest.mark.parametrize("split", [split for split in SPLITS if split != "scan"])
def test_another_split_of_the_same_layers_has_the_same_arrays(spec_of, arrays_of, name, split):
  arrays, other = arrays_of(name), spec_of(name, split)
  assert {path: leaf.shape for path, leaf in other.abstract().items()} == {
    path: leaf.shape for path, leaf in arrays.items()
  }
  assert_equal(other.to_arrays(other.from_arrays(arrays)), arrays)


def test_names_are_those_of_one_layer(spec_of):
  names = set(spec_of("adamw").abstract())
  assert "params/layers/3/moe/experts/down" in names
  assert {"step", "skipped", "params/embed/table", "params/head/weight"} <= names
  assert not [name for name in names if "stack/" in name or "layers/4/" in name]
  moments = [name for name in names if name.startswith("optimizer/") and "layers/3/moe" in name]
  assert {name.split("/layers/")[1] for name in moments} == {
    name.split("/layers/")[1] for name in names if name.startswith("params/layers/3/moe")
  }
  assert len(moments) == 2 * len([n for n in names if n.startswith("params/layers/3/moe")])


FROZEN = frozenset({"layers/1/attention/q", "layers/2/attention/q", "embed/table"})
BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.fixture(scope="module")
def in_bfloat16(decoder_of):
  """Returns a function (split, masters) -> (decoder, spec) of a model of bfloat16 files."""

  @functools.cache
  def decoder(split):
    wide = decoder_of(stack=SPLITS[split])
    return Decoder(dataclasses.replace(wide.config, param_dtype="bfloat16"), wide.vocab_size)

  def get(split="pairs", masters=Masters(frozen=FROZEN)):  # noqa: B008
    made = decoder(split)
    transform = make_optimizer(Optim(schedule=Constant()), 5, made.parameter_names, made.dims)
    return made, StateSpec(made, transform, one_device(), masters=masters)

  return get


def params_of(arrays):
  return {name.removeprefix(PARAMS): x for name, x in arrays.items() if name.startswith(PARAMS)}


def numbers(spec):
  """Returns arrays of a state in which every number is another."""
  rng = np.random.default_rng(1)
  return {
    name: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding)
    for name, x in spec.abstract().items()
  }


def test_what_trains_is_drawn_in_float32_and_what_is_frozen_is_of_the_file_s_dtype(in_bfloat16):
  _, spec = in_bfloat16()
  state = spec.init(3)
  assert state.params["stack"]["0"]["1"]["attention"]["q"].dtype == F32  # beside one that trains
  assert state.params["embed"]["table"].dtype == BF16
  assert {x.dtype.name for x in jax.tree.leaves(state.optimizer)} == {"float32", "int32"}
  for name, x in params_of(spec.to_arrays(state)).items():
    assert x.dtype == (BF16 if name in FROZEN else F32), name
    if x.dtype == F32 and not name.endswith("scale"):
      assert np.mean(x != x.astype(BF16)) > 0.9, name  # with all digits that were drawn


def test_dtypes_by_name_are_those_of_every_split(in_bfloat16):
  spec, other = in_bfloat16()[1], in_bfloat16("one and three")[1]
  arrays = numbers(spec)
  assert {name: x.dtype for name, x in other.abstract().items()} == {
    name: x.dtype for name, x in arrays.items()
  }
  for of in (spec, other):
    assert of.recast(arrays) == {}
    assert_equal(of.to_arrays(of.from_arrays(arrays)), arrays)


@pytest.mark.parametrize("only", [True, False])
def test_a_bfloat16_checkpoint_goes_on_in_float32_bit_for_bit_and_as_often_as_it_is_read(
  in_bfloat16, only
):
  store = MemoryStore()
  decoder, before = in_bfloat16(masters=Masters("bfloat16"))
  arrays = numbers(before)
  if only:
    arrays = {name: x for name, x in arrays.items() if name.startswith(PARAMS)}
  store.write(2, arrays, {ONLY: "params"} if only else {})
  _, spec = in_bfloat16(masters=came_from(store, Masters(frozen=FROZEN)))
  _, read, _ = read_state(store, spec, never)
  weights = sum(x.size for name, x in params_of(read).items() if name not in FROZEN)
  assert spec.recast(read) == {("bfloat16", "float32"): weights}
  masters = spec.to_arrays(spec.from_arrays(read))
  for name, x in params_of(masters).items():
    assert x.dtype == (BF16 if name in FROZEN else F32), name
    np.testing.assert_array_equal(x, arrays[PARAMS + name], err_msg=name)
  store.write(3, masters, {})
  assert spec.recast(read_state(store, spec, never)[1]) == {}
  _, read, _ = read_params(store, decoder, one_device(), never)
  assert_equal(read, {name: x for name, x in masters.items() if name.startswith(PARAMS)})


def test_what_is_frozen_is_of_the_dtype_that_its_checkpoint_has(in_bfloat16):
  store = MemoryStore()
  _, wide = in_bfloat16(masters=Masters())
  store.write(0, {n: x for n, x in numbers(wide).items() if n in wide.abstract_params()}, {ONLY: 1})
  _, spec = in_bfloat16(masters=came_from(store, Masters(frozen=FROZEN)))
  _, read, _ = read_state(store, spec, never)
  assert spec.recast(read) == {}
  assert {x.dtype.name for x in params_of(spec.to_arrays(spec.from_arrays(read))).values()} == {
    "float32"
  }


def never(step, why):
  raise AssertionError(why)


@pytest.fixture(scope="module")
def stored(spec_of, arrays_of, tmp_path_factory):
  """A checkpoint of a scanned run, as Orbax keeps it."""
  spec, arrays = spec_of("adamw"), arrays_of("adamw")
  store = open_store(tmp_path_factory.mktemp("checkpoints"))
  store.write(7, spec.to_arrays(spec.from_arrays(arrays)), {"step": 7})
  store.wait()
  yield store, arrays
  store.close()


@pytest.mark.parametrize("split, scan", [("scan", False), ("pairs", True), ("segments", True)])
def test_a_stored_scan_is_restored_under_every_other_split(spec_of, stored, split, scan):
  store, arrays = stored
  spec = spec_of("adamw", split, scan)
  read, record = store.read(7, spec.abstract())
  state = spec.from_arrays(read)
  assert record == {"step": 7}
  assert_equal(spec.to_arrays(state), arrays)
  down = state.params["stack"]["0"]["0"]["moe"]["experts"]["down"]
  first = arrays["params/layers/0/moe/experts/down"]
  np.testing.assert_array_equal(down[0], first)
  if split == "pairs":
    second = state.params["stack"]["0"]["1"]["moe"]["experts"]["down"]
    np.testing.assert_array_equal(down[1], arrays["params/layers/2/moe/experts/down"])
    np.testing.assert_array_equal(second[1], arrays["params/layers/3/moe/experts/down"])


def test_parameters_alone_are_read_without_the_optimizer(decoder_of, stored):
  store, arrays = stored
  decoder = decoder_of(stack=SPLITS["pairs"])
  read, _ = store.read(7, abstract_params(decoder, one_device()), under="params/")
  params = params_from_arrays(decoder, read)
  np.testing.assert_array_equal(
    params["stack"]["0"]["1"]["attention"]["q"][1], arrays["params/layers/3/attention/q"]
  )
  assert jax.tree.structure(params) == jax.tree.structure(decoder.shapes)


def test_a_checkpoint_of_before_has_no_steps_without_labels(spec_of, arrays_of):
  spec, arrays, store = spec_of("adamw"), arrays_of("adamw"), MemoryStore()
  assert int(arrays["unlabelled"]) > 0
  before = {name: x for name, x in arrays.items() if name != "unlabelled"}
  store.write(7, before, {})
  step, read, _ = read_state(store, spec, pytest.fail)
  state = spec.from_arrays(read)
  assert step == 7 and int(state.unlabelled) == 0
  assert_equal(spec.to_arrays(state), {**before, "unlabelled": np.int32(0)})
  store.write(8, arrays, {})
  assert_equal(read_state(store, spec, pytest.fail)[1], arrays)
  store.write(9, {name: x for name, x in before.items() if name != "skipped"}, {})
  with pytest.raises(InputError, match="skipped not in the checkpoint"):
    read_state(store, spec, pytest.fail)


def test_a_tree_of_another_depth_is_refused_by_name(decoder_of, stored):
  store, _ = stored
  deeper = decoder_of(stack=lambda block: (LayerGroup((block,), repeats=REPEATS + 1),))
  with pytest.raises(InputError, match="layers/4/"):
    store.read(7, abstract_params(deeper, one_device()), under="params/")


def test_a_fresh_state_depends_on_the_seed_and_not_on_the_split(spec_of):
  whole, pairs = spec_of("adamw"), spec_of("adamw", "pairs")
  first = whole.to_arrays(whole.init(3))
  assert_equal(first, pairs.to_arrays(pairs.init(3)))
  other = whole.to_arrays(whole.init(4))
  assert np.any(first["params/embed/table"] != other["params/embed/table"])
  assert first["step"] == first["skipped"] == 0
