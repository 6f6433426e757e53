"""The state of training, in memory and as a checkpoint sees it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.checkpoint import Store
from jaxmoe.checkpoint.store import read_latest
from jaxmoe.core import names, peers
from jaxmoe.core.layout import Layout
from jaxmoe.core.rng import Keys
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.optim import state_dims

Arrays = dict[str, jax.Array]
Found = tuple[int, Arrays, dict[str, Any]]
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
class Recent:
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
  recent: Recent
  unlabelled: Any

  @classmethod
  def first(cls, params: Params, optimizer: Any, window: int = 0) -> State:
    """Returns the state before the first step."""
    none = [jnp.zeros((), jnp.int32) for _ in range(5)]
    recent = Recent(jnp.zeros((2, window), jnp.float32), none[3])
    return cls(none[0], params, optimizer, none[1], none[2], recent, none[4])


class StateSpec:
  """Shapes, shardings and canonical names of the state of one run."""

  def __init__(
    self, decoder: Decoder, transform: optax.GradientTransformation, layout: Layout, window: int = 0
  ):
    self.splits = decoder.splits
    self.decoder, self._transform = decoder, transform
    optimizer = jax.eval_shape(transform.init, decoder.shapes)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    recent = Recent(jax.ShapeDtypeStruct((2, window), jnp.float32), scalar)
    self.shapes = State(scalar, decoder.shapes, optimizer, scalar, scalar, recent, scalar)
    dims = state_dims(optimizer, decoder.shapes, decoder.dims)
    self.shardings = State(
      layout.replicated,
      layout.shardings("params", decoder.dims, decoder.shapes),
      layout.shardings("optimizer", dims, optimizer),
      layout.replicated,
      layout.replicated,
      Recent(layout.replicated, layout.replicated),
      layout.replicated,
    )

  def init(self, seed: int) -> State:
    """Returns the state before the first step."""
    return self.fresh(self._params(seed))

  def fresh(self, params: Params) -> State:
    """Returns the state before the first step of given parameters, laid out as they are to be."""
    optimizer = jax.jit(self._transform.init, out_shardings=self.shardings.optimizer)(params)
    window = self.shapes.recent.values_2W.shape[1]
    first = State.first(params, optimizer, window)
    rest = ("step", "skipped", "in_a_row", "recent", "unlabelled")
    placed = {
      name: peers.place(getattr(first, name), getattr(self.shardings, name)) for name in rest
    }
    return dataclasses.replace(first, **placed)

  def _params(self, seed: int) -> Params:
    def fresh() -> Params:
      return self.decoder.init(Keys.from_seed(seed))

    if peers.several():  # one program, which process 0 alone writes into the compile cache
      return jax.jit(fresh, out_shardings=self.shardings.params)()
    return jax.device_put(fresh(), self.shardings.params)

  def to_arrays(self, state: State) -> Arrays:
    """Returns the leaves by canonical name, one a layer."""
    return _unstack(names.flatten(state), self.splits)

  def like(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what `to_arrays` would, without values, with the shardings to restore in."""
    flat = names.flatten(self.shapes)
    shardings = names.flatten(self.shardings)
    like = {}
    for path, leaf in flat.items():
      stacked = names.layer_names(path, self.splits)
      sharding, shape = shardings[path], leaf.shape
      if stacked is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*tuple(sharding.spec)[1:]))
        shape = shape[1:]
      one = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
      like.update(dict.fromkeys(stacked or [path], one))
    return like

  def params_like(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the parameters' part of `like`."""
    return {name: leaf for name, leaf in self.like().items() if name.startswith(PARAMS)}

  def from_arrays(self, arrays: Arrays) -> State:
    """Returns the state whose `to_arrays` gave `arrays`, which may be those of older code.

    Parameters alone get fresh moments.
    """
    if all(name.startswith(PARAMS) for name in arrays):
      params = params_from_arrays(self.decoder, arrays)
      return self.fresh(jax.device_put(params, self.shardings.params))
    paths = names.flatten(self.shapes)

    def stacked(named: Arrays) -> Arrays:
      first = {name: jnp.zeros((), jnp.int32) for name in _LATER}
      return names.stack({**first, **named}, list(paths), self.splits)

    flat = jax.jit(stacked)(arrays)
    return jax.device_put(names.unflatten(self.shapes, flat), self.shardings)


def params_like(decoder: Decoder, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the parameters' part of `StateSpec.like`, for commands that do not train."""
  return StateSpec(decoder, optax.identity(), layout).params_like()


def read_state(
  store: Store, spec: StateSpec, on_damage: Callable[[int, str], None], set_aside: bool = True
) -> Found | None:
  """Returns step, arrays and record of the newest intact step, see `read_latest`.

  The arrays are those of a state, but counters that the step has not, or of parameters alone where
  it has no others.
  """

  def like(step: int) -> dict[str, jax.ShapeDtypeStruct]:
    there = store.contents(step)
    if all(name.startswith(PARAMS) for name in there):
      return spec.params_like()
    return {name: x for name, x in spec.like().items() if name in there or name not in _LATER}

  return read_latest(store, like, on_damage, set_aside=set_aside)


def params_from_arrays(decoder: Decoder, arrays: Arrays) -> Params:
  """Returns the parameters' tree for arrays read by `params_like`."""
  tree = {"params": decoder.shapes}
  flat = names.stack(arrays, list(names.flatten(tree)), decoder.splits)
  return names.unflatten(tree, flat)["params"]


@functools.partial(jax.jit, static_argnums=1)
def _unstack(flat: Arrays, splits: names.Splits) -> Arrays:
  return names.unstack(flat, splits)

