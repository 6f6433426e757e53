"""The train state, in memory and as a checkpoint sees it.

Parameters may lie in a checkpoint in another dtype than they train in (`optim/masters.py`): a file
that was converted, or a run of before there were masters. They are read as they are, and cast.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.checkpoint import Store
from jaxmoe.checkpoint.store import read_latest
from jaxmoe.core import multihost, param_names
from jaxmoe.core.errors import CheckpointError
from jaxmoe.core.kept_programs import Compiler, Program
from jaxmoe.core.layout import Layout
from jaxmoe.core.rng import Keys, check_seed
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.optim import Masters, state_dims
from jaxmoe.train.stage_arrays import is_staged, layer_shardings, put_together, take_apart

Arrays = dict[str, jax.Array]
Abstract = dict[str, jax.ShapeDtypeStruct]
StoredStep = tuple[int, Arrays, dict[str, Any]]
PARAMS = "params/"
ONLY = "only"
"""A key of the record of a step that holds parameters alone, as one converted does."""
_LATER = ("unlabelled",)
"""Counters that the first checkpoints had not; there they are 0."""


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["values_2W", "count"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SpikeWindow:
  """What the last steps that did no harm looked like; see `experiment.Recovery`.

  Attributes:
    values_2W: float32, their losses and gradient norms, a ring of W.
    count: int32, how many there were in all.
  """

  values_2W: Any
  count: Any


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["step", "params", "optimizer", "skipped", "in_a_row", "recent", "unlabelled"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
  """All that a step reads and writes.

  Attributes:
    step: int32, steps taken, skipped and unlabelled ones included.
    params: The parameters.
    optimizer: The optax state.
    skipped: int32, steps that changed nothing because they would have done harm.
    in_a_row: int32, how many of them were the last ones of those with labels.
    recent: What a spike is told by.
    unlabelled: int32, steps that changed nothing because no token had a label.
  """

  step: Any
  params: Params
  optimizer: Any
  skipped: Any
  in_a_row: Any
  recent: SpikeWindow
  unlabelled: Any

  @classmethod
  def create(cls, params: Params, optimizer: Any, window: int = 0) -> State:
    """Returns the state before the first step."""
    none = [jnp.zeros((), jnp.int32) for _ in range(5)]
    recent = SpikeWindow(jnp.zeros((2, window), jnp.float32), none[3])
    return cls(none[0], params, optimizer, none[1], none[2], recent, none[4])


class StateSpec:
  """Shapes, shardings and canonical names of the state of one run.

  Attributes:
    masters: In which dtypes parameters train.
    layer_groups: How layers are grouped in memory.
    shapes: Of the state in memory.
    shardings: Of it.

  Args:
    compiled: What makes programs.
  """

  def __init__(
    self, decoder: Decoder, transform: optax.GradientTransformation, layout: Layout,
    window: int = 0, masters: Masters | None = None, compiled: Compiler | None = None,
  ):  # fmt: skip
    self._compiled = compiled = compiled or Compiler()
    self.masters = masters = masters or Masters()
    self.layer_groups = decoder.layer_groups
    self.decoder, self._transform = decoder, transform
    params = masters.shapes(decoder.shapes, decoder.layer_groups)
    optimizer = compiled.shapes("optimizer", transform.init, params)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    recent = SpikeWindow(jax.ShapeDtypeStruct((2, window), jnp.float32), scalar)
    self.shapes = State(scalar, params, optimizer, scalar, scalar, recent, scalar)
    dims = state_dims(optimizer, params, decoder.dims)
    self.shardings = State(
      layout.replicated,
      layout.shardings("params", decoder.dims, params),
      layout.shardings("optimizer", dims, optimizer),
      layout.replicated,
      layout.replicated,
      SpikeWindow(layout.replicated, layout.replicated),
      layout.replicated,
    )

  def init(self, seed: int) -> State:
    """Returns the state before the first step, which one program makes where it is to lie.

    Raises:
      InputError: the seed does not fit 32 bits.
    """
    check_seed(seed)
    program = Program("first_state", self._first, out_shardings=self.shardings)
    return self._compiled(program, np.uint32(seed))(np.uint32(seed))

  def _first(self, seed: jax.Array) -> State:
    spread = len(self.shardings.step.device_set) > 1
    params = self.cast(in_float32(self.decoder).init(Keys(jax.random.key(seed)), spread))
    window = self.shapes.recent.values_2W.shape[1]
    return State.create(params, self._transform.init(params), window)

  def fresh(self, params: Params) -> State:
    """Returns the state before the first step of given parameters, laid out as they are to be."""
    optimizer = jax.jit(self._transform.init, out_shardings=self.shardings.optimizer)(params)
    window = self.shapes.recent.values_2W.shape[1]
    first = State.create(params, optimizer, window)
    rest = ("step", "skipped", "in_a_row", "recent", "unlabelled")
    placed = {
      name: multihost.put_on_mesh(getattr(first, name), getattr(self.shardings, name))
      for name in rest
    }
    return dataclasses.replace(first, **placed)

  def cast(self, params: Params) -> Params:
    """Returns parameters in the dtypes they have in memory."""
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, self.shapes.params)

  def to_arrays(self, state: State) -> Arrays:
    """Returns the leaves by canonical name, one a layer, each in its own dtype."""
    arrays = unstacked(param_names.flatten(state), self.layer_groups)
    own = {name: leaf.dtype for name, leaf in self.abstract_params().items()}
    return {
      name: leaf.astype(own[name]) if name in own and leaf.dtype != own[name] else leaf
      for name, leaf in arrays.items()
    }

  def abstract(self) -> Abstract:
    """Returns what `to_arrays` would, without values, with the shardings to restore in."""
    flat = param_names.flatten(self.shapes)
    shardings = param_names.flatten(self.shardings)
    declared = param_names.flatten({"params": self.decoder.shapes})
    like = {}
    for path, leaf in flat.items():
      stacked = param_names.layer_names(path, self.layer_groups)
      sharding, shape = shardings[path], leaf.shape
      lie = [sharding]
      if stacked is not None:
        lie, shape = _of_layers(sharding, len(stacked)), shape[1:]
      for name, sharding in zip(stacked or [path], lie, strict=True):
        if not name:
          continue
        dtype = leaf.dtype
        if path in declared:
          dtype = self.masters.of(name.removeprefix(PARAMS), declared[path].dtype)
        like[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return like

  def abstract_params(self) -> Abstract:
    """Returns the parameters' part of `abstract`."""
    return {name: leaf for name, leaf in self.abstract().items() if name.startswith(PARAMS)}

  def recast(self, arrays: Arrays) -> dict[tuple[str, str], int]:
    """Returns how many weights of a step are of one dtype there and go on in another."""
    found: dict[tuple[str, str], int] = {}
    for name, like in self.abstract_params().items():
      pair = (arrays[name].dtype.name, like.dtype.name)
      if pair[0] != pair[1]:
        found[pair] = found.get(pair, 0) + arrays[name].size
    return found

  def from_arrays(self, arrays: Arrays) -> State:
    """Returns the state whose `to_arrays` gave `arrays`, which may be those of older code.

    Parameters alone get fresh moments.
    """
    if all(name.startswith(PARAMS) for name in arrays):
      only = {"params": self.shapes.params}
      flat = self._stacked(arrays, param_names.flatten(only))
      params = param_names.unflatten(only, flat)["params"]
      return self.fresh(jax.device_put(params, self.shardings.params))
    flat = self._stacked(arrays, param_names.flatten(self.shapes))
    return jax.device_put(param_names.unflatten(self.shapes, flat), self.shardings)

  def _stacked(self, arrays: Arrays, paths: Mapping[str, Any]) -> Arrays:
    """Returns the leaves at `paths` of arrays by canonical name, in the dtypes in memory."""
    shardings = param_names.flatten(self.shardings)
    names = {path: param_names.layer_names(path, self.layer_groups) for path in paths}
    staged = {path: several for path, several in names.items()
              if several is not None and is_staged(shardings[path])}  # fmt: skip
    rest = [path for path in paths if path not in staged]

    def stacked(named: Arrays) -> Arrays:
      first = {name: jnp.zeros((), jnp.int32) for name in _LATER}
      flat = param_names.stack({**first, **named}, rest, self.layer_groups)
      return {path: leaf.astype(paths[path].dtype) for path, leaf in flat.items()}

    used = {name for several in staged.values() for name in several}
    apart = {
      path: put_together(arrays, several, paths[path], shardings[path])
      for path, several in staged.items()
    }
    whole = {name: leaf for name, leaf in arrays.items() if name not in used}
    return {**jax.jit(stacked)(whole), **apart}


def in_float32(decoder: Decoder) -> Decoder:
  """Returns the decoder that draws float32 parameters, whatever its files hold."""
  if decoder.config.param_dtype == "float32":
    return decoder
  config = dataclasses.replace(decoder.config, param_dtype="float32")
  return Decoder(config, decoder.vocab_size, decoder.parallel, decoder.layer_groups)


def abstract_params(decoder: Decoder, layout: Layout) -> Abstract:
  """Returns the parameters' part of `StateSpec.abstract`, in the dtypes that the model declares."""
  declared = Masters(decoder.config.param_dtype)
  return StateSpec(decoder, optax.identity(), layout, masters=declared).abstract_params()


def as_stored(like: Abstract, there: Mapping[str, Any]) -> Abstract:
  """Returns what to ask of a step: `like`, with parameters in the float dtypes they have there."""

  def is_float(dtype: Any) -> bool:
    return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)

  def asked(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    held = there.get(name, leaf).dtype
    if not name.startswith(PARAMS) or not is_float(held) or not is_float(leaf.dtype):
      return leaf
    return jax.ShapeDtypeStruct(leaf.shape, held, sharding=leaf.sharding)

  return {name: asked(name, leaf) for name, leaf in like.items()}


def came_from(store: Store, masters: Masters) -> Masters:
  """Returns the masters of a run that goes on from a store: what is frozen is as it is there."""
  for step in reversed(store.steps() if masters.frozen else []):
    try:
      there = store.contents(step)
    except CheckpointError:
      continue  # what is wrong with it is said when its arrays are read
    came = {name.removeprefix(PARAMS): held.dtype for name, held in there.items()}
    return dataclasses.replace(masters, came=came)
  return masters


def read_state(
  store: Store, spec: StateSpec, on_damage: Callable[[int, str], None], set_aside: bool = True
) -> StoredStep | None:
  """Returns step, arrays and record of the newest intact step, see `read_latest`.

  The arrays are those of a state, but counters that the step has not, or of parameters alone where
  it has no others.
  """

  def like(step: int) -> Abstract:
    there = store.contents(step)
    if all(name.startswith(PARAMS) for name in there):
      return as_stored(spec.abstract_params(), there)
    wanted = {name: x for name, x in spec.abstract().items() if name in there or name not in _LATER}
    return as_stored(wanted, there)

  return read_latest(store, like, on_damage, set_aside=set_aside)


def read_params(
  store: Store, decoder: Decoder, layout: Layout, on_damage: Callable[[int, str], None]
) -> StoredStep | None:
  """Returns step, parameters and record of the newest intact step; sets nothing aside.

  Parameters are of the dtypes they have there.
  """
  wanted = abstract_params(decoder, layout)

  def like(step: int) -> Abstract:
    return as_stored(wanted, store.contents(step))

  return read_latest(store, like, on_damage, under=PARAMS, set_aside=False)


def params_from_arrays(decoder: Decoder, arrays: Arrays) -> Params:
  """Returns the parameters' tree for arrays read by `abstract_params`."""
  tree = {"params": decoder.shapes}
  flat = param_names.stack(arrays, list(param_names.flatten(tree)), decoder.layer_groups)
  return param_names.unflatten(tree, flat)["params"]


def unstack_params(decoder: Decoder, params: Params) -> Arrays:
  """Returns parameters by canonical name, one a layer."""
  return unstacked(param_names.flatten({"params": params}), decoder.layer_groups)


def unstacked(flat: Arrays, layer_groups: param_names.LayerGroupSizes) -> Arrays:
  """Returns leaves by canonical name, one a layer; over stages each where its stage is."""
  apart: Arrays = {}
  for path, leaf in flat.items():
    names = param_names.layer_names(path, layer_groups)
    if names is not None and is_staged(leaf.sharding):
      apart.update(take_apart(leaf, names))
      flat = {other: of for other, of in flat.items() if other != path}
  return {**_unstack(flat, layer_groups), **apart}


def _of_layers(sharding: Any, rows: int) -> list[Any]:
  """Returns where each layer of a stacked leaf lies by itself."""
  if is_staged(sharding):
    return list(layer_shardings(sharding, rows))
  rest = PartitionSpec(*tuple(sharding.spec)[1:])
  return [NamedSharding(sharding.mesh, rest)] * rows


@functools.partial(jax.jit, static_argnums=1)
def _unstack(flat: Arrays, layer_groups: param_names.LayerGroupSizes) -> Arrays:
  return param_names.unstack(flat, layer_groups)

