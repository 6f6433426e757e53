"""The engine of pipelines: one scan over the ticks of static columns, whatever the table.

At every tick a device does the pass of its column in a branch, and then all of them take part in
every permute, outside of branches; who has nothing to send sends zeros. In a branch that not all
devices take a permute waits for who never comes, or on CPU hands out wrong numbers without a word:
a pass that has one is refused by name. Sums, gathers and exchanges over other axes are between
devices of one stage, which take the same branch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun, jaxprs_in_params

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines import Columns

Row = dict[str, jax.Array]
"""The columns of one tick on one device, scalars by name."""
_PERMUTES = frozenset(("ppermute", "pshuffle", "collective_permute"))
_READS = {"f_input": "inputs", "b_input": "inputs", "b_grad": "grads", "b_kept": "kept"}
_WRITES = {"forward": "inputs", "backward": "grads"}


class VocabularyEnds(NamedTuple):
  """What all devices do together before the passes of a tick and after them.

  Attributes:
    device: Where the first stage lies.
    embed: Returns the first stage's input of a microbatch, on every device.
    unembed: Returns the state with what the embedding's gradient gets of a microbatch, from the
      gradient of the first stage's input; it is zeros on all devices but that stage's. None of
      forward passes alone.
  """

  device: int
  embed: Callable[[jax.Array], Any]
  unembed: Callable[[jax.Array, Any, Any], Any] | None = None


class PassResult(NamedTuple):
  """What a pass makes.

  Attributes:
    state: What the device carries from tick to tick.
    forward: The message to the next stage; None for none.
    backward: The gradient of the message from the stage before; None for none.
    kept: What a backward pass will need of this one, in the shape of slots; None for nothing.
  """

  state: Any
  forward: Any = None
  backward: Any = None
  kept: Any = None


Pass = Callable[[Row, dict[str, Any], Any], PassResult]
"""From a row, what it reads by column (`f_input`, `b_input`, `b_grad`, `b_kept`), and the state."""


def scan_ticks(
  columns: Columns,
  axis: str,
  passes: Sequence[tuple[str, Pass]],
  which_PK: np.ndarray,
  message: Any,
  state: Any,
  ends: VocabularyEnds | None = None,
  kept: Any = None,
) -> Any:
  """Returns the state after all ticks; for use inside `shard_map`.

  Args:
    columns: What each device does at each tick.
    axis: The mesh axis of the stages.
    passes: The branches, with names for errors. The first is for who is idle.
    which_PK: Which of them each device takes at each tick.
    message: Shapes of the message from stage to stage, a tree.
    state: Of this device before the first tick.
    ends: Where the vocabulary lies over all devices.
    kept: Shapes of what a pass keeps for another in a slot, a tree.

  Raises:
    InputError: a pass has a permute inside.
  """
  nothing, unkept = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (message, kept))
  branches = [_branch(name, does, nothing, unkept) for name, does in passes]
  rows, slots = _rows(columns, axis, which_PK), columns.slots
  none = {"inputs": nothing, "grads": nothing, "kept": unkept}
  pools = {
    pool: jax.tree.map(functools.partial(empty_slots, count), none[pool])
    for pool, count in (("inputs", slots.inputs), ("grads", slots.grads), ("kept", slots.kept))
    if count
  }

  def tick(carry: tuple[Any, Any], row: Row) -> tuple[tuple[Any, Any], None]:
    pools, state = carry
    if ends is not None:
      pools = {**pools, "inputs": _embedded(ends, axis, row, pools["inputs"], nothing)}
    taken = {
      column: read_slot(pools[pool], row[column]) if pool in pools else none[pool]
      for column, pool in _READS.items()
    }
    made = PassResult(*jax.lax.switch(row["pass"], branches, row, taken, state))
    for number, channel in enumerate(columns.channels):
      sent = made.forward if channel.flow == "forward" else made.backward
      sends = row[f"sends{number}"]
      sent = jax.tree.map(lambda leaf, sends=sends: jnp.where(sends, leaf, 0), sent)
      came = _moved(sent, axis, channel.route, columns.placement.num_devices)
      pool = _WRITES[channel.flow]
      if pool in pools:  # of a forward pass alone nobody may read what comes
        pools = {**pools, pool: write_slot(pools[pool], row[f"slot{number}"], came)}
    if "kept" in pools:
      pools = {**pools, "kept": write_slot(pools["kept"], row["f_kept"], made.kept)}
    state = made.state
    if ends is not None and ends.unembed is not None:
      state = _unembedded(ends, axis, row, made.backward, state)
    return (pools, state), None

  (_, state), _ = jax.lax.scan(tick, (pools, state), rows)
  return state


def _embedded(ends: VocabularyEnds, axis: str, row: Row, inputs: Any, nothing: Any) -> Any:
  """Returns the slots of inputs with what the first stage takes at this tick, if anything."""
  micro = row["embed"]
  came = jax.lax.cond(micro >= 0, lambda: ends.embed(jnp.maximum(micro, 0)), lambda: nothing)
  here = (jax.lax.axis_index(axis) == ends.device) & (micro >= 0)
  return write_slot(inputs, jnp.where(here, row["f_input"], -1), came)


def _unembedded(ends: VocabularyEnds, axis: str, row: Row, backward: Any, state: Any) -> Any:
  """Returns the state with the embedding's gradient of what the first stage took, if anything."""
  micro, here = row["unembed"], jax.lax.axis_index(axis) == ends.device
  own = jax.tree.map(lambda leaf: jnp.where(here, leaf, 0), backward)
  assert ends.unembed is not None
  add = functools.partial(ends.unembed, jnp.maximum(micro, 0), own)
  return jax.lax.cond(micro >= 0, add, lambda state: state, state)


def _rows(columns: Columns, axis: str, which_PK: np.ndarray) -> Row:
  """Returns this device's columns, (K,) each."""
  forward = ("stage", "micro", "input", "kept")
  backward = (*forward, "grad", "deferred")
  names = [*(f"f_{name}" for name in forward), *(f"b_{name}" for name in backward)]
  tables = {name: getattr(columns, name) for name in (*names, "vocabulary")}
  for name in ("embed", "unembed"):  # of all devices alike
    tables[name] = np.broadcast_to(getattr(columns, name), which_PK.shape)
  tables["pass"] = which_PK.astype(np.int32)
  for number, channel in enumerate(columns.channels):
    tables[f"sends{number}"], tables[f"slot{number}"] = channel.sends_PK, channel.slot_PK
  device = jax.lax.axis_index(axis)
  return {name: jnp.asarray(table)[device] for name, table in tables.items()}


def _branch(name: str, does: Pass, nothing: Any, unkept: Any) -> Callable[..., Any]:
  """Returns a pass as a branch: all its outputs are there, and no permute is inside."""

  def full(row: Row, taken: dict[str, Any], state: Any) -> tuple[Any, Any, Any, Any]:
    made = does(row, taken, state)
    forward, backward = (
      nothing if sent is None else sent for sent in (made.forward, made.backward)
    )
    return made.state, forward, backward, unkept if made.kept is None else made.kept

  def branch(row: Row, taken: dict[str, Any], state: Any) -> Any:
    program, shapes = jax.make_jaxpr(full, return_shape=True)(row, taken, state)
    check_no_permute(name, program.jaxpr)
    flat = jaxpr_as_fun(program)(*jax.tree.leaves((row, taken, state)))
    return jax.tree.unflatten(jax.tree.structure(shapes), flat)

  return branch


def check_no_permute(name: str, program: Any) -> None:
  """Refuses a traced pass that has a permute inside.

  Raises:
    InputError: which pass.
  """
  found = sorted(_PERMUTES & set(_primitives(program)))
  if found:
    raise InputError(
      f"the pass {name} of a pipeline has a permute inside ({found[0]}), which devices of other "
      "stages do not take part in; use an exchange or attend that gathers"
    )


def _primitives(program: Any) -> Iterator[str]:
  """Yields the names of all primitives of a program, those of programs inside included."""
  for equation in program.eqns:
    yield equation.primitive.name
    for inner in jaxprs_in_params(equation.params):
      yield from _primitives(inner)


def empty_slots(count: int, leaf: Any) -> jax.Array:
  """Returns zeros for so many of a leaf of this shape."""
  return jnp.zeros((count, *leaf.shape), leaf.dtype)


def _moved(sent: Any, axis: str, route: str, size: int) -> Any:
  """Returns what came to this device."""
  if route == "here":
    return sent
  step = 1 if route == "right" else -1
  ring = [(device, (device + step) % size) for device in range(size)]
  return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, ring), sent)


def read_slot(pool: Any, slot: jax.Array) -> Any:
  """Returns what lies in a slot of a pool; of slot -1 whatever lies in the first."""
  return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False), pool)


def write_slot(pool: Any, slot: jax.Array, came: Any) -> Any:
  """Returns a pool with what came in its slot; as it was where that is -1."""

  def put(slots: jax.Array, leaf: jax.Array) -> jax.Array:
    here = jnp.maximum(slot, 0)
    before = jax.lax.dynamic_index_in_dim(slots, here, keepdims=False)
    kept = jnp.where(slot >= 0, leaf, before)
    return jax.lax.dynamic_update_index_in_dim(slots, kept, here, 0)

  return jax.tree.map(put, pool, came)
