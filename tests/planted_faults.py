"""Faults planted in the engine one at a time, and the cell of the parity table each turns red.

python -m tests.planted_faults [GLOB]

A cell must be green as the engine is and red with the fault. Prints a line a fault: its name, the
cell, and the quantities that are wrong with their largest errors. Takes about ten minutes.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import math
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.models.loss_pieces import LossPieces
from jaxmoe.moe import expert_outputs
from jaxmoe.ops.cross_entropy import all_logits
from jaxmoe.parallel import MeshContext, Parallel, ParamGatherer, ReduceScatter
from jaxmoe.parity import Cell, cell_errors, is_green
from jaxmoe.train import gradients
from tests.planted_faults_of_context import FAULTS_OF_CONTEXT
from tests.planted_faults_of_exchange import FAULTS_OF_EXCHANGE, FOLD_DATA, own_part
from tests.planted_faults_of_pipe import FAULTS_OF_PIPE

DATA, EXPERT, TENSOR = Cell(Parallel(data=2)), Cell(Parallel(expert=2)), Cell(Parallel(tensor=2))
BOTH = Cell(Parallel(data=2, expert=2))
SEQUENCE = Cell(Parallel(tensor=2, sequence=True))
PARTS = Cell(Parallel(tensor=2, partition_activations=True))
NOISY = dataclasses.replace(DATA, router="noisy")
AUX_FREE = dataclasses.replace(DATA, router="aux_free")
CAPACITY = dataclasses.replace(DATA, dispatch="capacity")
CONSTANT = dataclasses.replace(TENSOR, experts="zero_copy_constant")
BIASED = dataclasses.replace(TENSOR, attention="sinks")
KEY_HEADS = Cell(Parallel(tensor=4))  # twice as many devices as key heads
FOLD_TENSOR = Cell(Parallel(expert=2, tensor=2, fold=("tensor",)))
ZERO_2, ZERO_3 = Cell(Parallel(fsdp=2, zero=2)), Cell(Parallel(fsdp=2, zero=3))

Make = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Fault:
  """What stands in the place of a name, and where that shows.

  Attributes:
    cell: The cell that it turns red.
    owner: The module or class.
    name: What is replaced there.
    make: From the original to what takes its place.
  """

  cell: Cell
  owner: Any
  name: str
  make: Make

  @contextlib.contextmanager
  def planted(self) -> Any:
    """Plants the fault; no program traced with or without it outlives that."""
    jax.clear_caches()
    with mock.patch.object(self.owner, self.name, self.make(getattr(self.owner, self.name))):
      yield
    jax.clear_caches()


def wrong(cell: Cell) -> dict[str, float]:
  """Returns the quantities of a cell that are not green, with their largest errors."""
  return {name: value for name, value in cell_errors(cell).items() if not is_green({name: value})}


@functools.cache
def wrong_without(cell: Cell) -> dict[str, float]:
  """Returns the same with the engine as it is; its reference is kept for the faults."""
  return wrong(cell)


def as_is(original: Any) -> Any:
  """What returns its argument untouched."""
  return lambda self, x, *_: x


def property_of(value: Callable[[Any], Any]) -> Make:
  """Returns a property in the place of another; `value` is of the original's."""
  return lambda original: property(lambda self: value(original.fget(self)))


def embed_alone(original: Any) -> Any:
  """An embedding of the rows that a device has."""

  def embed(self, *args: Any) -> Any:
    with mock.patch.object(MeshContext, "reduce_tensor", as_is(None)):
      return original(self, *args)

  return embed


def next_part(original: Any) -> Any:
  """The part of the sequence of the next device."""

  def mine(self, x_BLF: jax.Array) -> jax.Array:
    size = x_BLF.shape[1] // self.tensor_size
    return original(self, jnp.roll(x_BLF, -size, axis=1))

  return mine


def whole_summed(original: Any) -> Any:
  """Outputs that all devices of a tensor group have are added up like parts."""

  def reduce(self, parallel: Any) -> jax.Array:
    parts = [part for part in (self.partial, self.replicated) if part is not None]
    return original(dataclasses.replace(self, partial=sum(parts), replicated=None), parallel)

  return reduce


def total_of_less(original: Any) -> Any:
  """Sums over all axes of tokens but the last."""
  return lambda self, tree: jax.lax.psum(tree, self._token_axes[:-1])


def counts_of_each(original: Any) -> Any:
  """Labels, tokens and rows as a device counts its own."""
  return lambda self, tree: tree if isinstance(tree, tuple) else original(self, tree)


def drops_of_each(original: Any) -> Any:
  """Drops as a device counts its own."""
  return lambda self, sums: dataclasses.replace(original(self, sums), dropped=sums.dropped)


def share_of_copies(original: Any) -> Any:
  """A loss that every device of a tensor group adds whole."""

  def loss(decoder: Any, *args: Any) -> Any:
    value, metrics = original(decoder, *args)
    return value * decoder.parallel.tensor_size, metrics

  return loss


def sums_over(change: Callable[[str, tuple[str, ...]], tuple[str, ...]]) -> Make:
  """Returns gradients that are summed over other axes; `change` is of path and axes."""

  def make(original: Any) -> Any:
    def init(self, *args: Any) -> None:
      original(self, *args)
      self._sums = {path: change(path, axes) for path, axes in self._sums.items()}

    return init

  return make


def divided(original: Any) -> Any:
  """Gradients that are averaged, though each device has only its share."""
  return lambda self, grads: jax.tree.map(lambda leaf: leaf / 2, original(self, grads))


def cut_not_summed(original: Any) -> Any:
  """A device's part of its own gradient in the place of a reduce-scatter."""

  def scattered(self, grads: Any) -> Any:
    with mock.patch.object(jax.lax, "psum_scatter", own_part):
      return original(self, grads)

  return scattered


def gathered_in_turn(original: Any) -> Any:
  """Gathered weights whose parts are in another order; scales not, or all would still agree."""

  def gather(self, leaf: jax.Array, how: Any) -> jax.Array:
    at = how.gather
    ready = original(self, leaf, how)
    return ready if at is None or leaf.ndim == 1 else jnp.roll(ready, leaf.shape[at], axis=at)

  return gather


def gathered_for_good(original: Any) -> Any:
  """Gathered weights that no gradient reaches."""

  def gather(self, leaf: jax.Array, how: Any) -> jax.Array:
    ready = original(self, leaf, how)
    if how.gather is None:
      return ready
    # Linear, as a gather must be, and its transpose loses what it is given.
    return jax.custom_derivatives.linear_call(
      lambda _, x: x, lambda _, grad: jnp.zeros_like(grad), (), ready
    )

  return gather


def on_every_device(original: Any) -> Any:
  """Biases of sums that every device of a tensor group adds."""
  return lambda self, leaf, how: original(self, leaf, dataclasses.replace(how, once=False))


def other_key_head(original: Any) -> Any:
  """The key head that other query heads read."""

  def cut(self, leaf: jax.Array, dim: int, kind: str) -> jax.Array:
    return original(self, jnp.roll(leaf, 1, axis=dim) if kind == "kv_heads" else leaf, dim, kind)

  return cut


def labels_off_by_one(original: Any) -> Any:
  """A part of the vocabulary that begins one too late on all devices but the first."""

  def piece(logits_TV: jax.Array, labels_T: jax.Array, part: Any) -> Any:
    late = jax.lax.axis_index(part.axis) > 0
    return original(logits_TV, labels_T - late.astype(labels_T.dtype), part)

  return piece


_ELSEWHERE = FAULTS_OF_EXCHANGE | FAULTS_OF_CONTEXT | FAULTS_OF_PIPE
FAULTS = {
  "a sum at the end of a pair is missing": Fault(TENSOR, MeshContext, "psum_tensor", as_is),
  "a device leaves its part of the sequence without a sum": Fault(
    SEQUENCE, MeshContext, "reduce_tensor", lambda _: MeshContext.slice_sequence
  ),
  "rows of the embedding are not summed": Fault(TENSOR, MeshContext, "embed", embed_alone),
  "what all devices found is summed": Fault(
    CONSTANT, expert_outputs.ExpertOutputs, "reduce", whole_summed
  ),
  "a part of the sequence is the next device's": Fault(
    FOLD_TENSOR, MeshContext, "_mine", next_part
  ),
  "a layer is made again from the next device's part": Fault(
    PARTS, MeshContext, "slice_tokens", next_part
  ),
  "shares of tokens are not put together": Fault(
    FOLD_TENSOR,
    MeshContext,
    "all_gather_tokens",
    lambda _: lambda self, y_BLD: jnp.tile(y_BLD, (1, 2, 1)),
  ),
  "every copy adds its loss whole": Fault(TENSOR, gradients, "_loss", share_of_copies),
  "the vocabulary's part begins one late": Fault(
    TENSOR, all_logits, "_of_part", labels_off_by_one
  ),
  "a query head reads another's keys": Fault(KEY_HEADS, ParamGatherer, "_cut", other_key_head),
  "a bias of a sum is added by every device": Fault(
    BIASED, ParamGatherer, "_gather", on_every_device
  ),
  "token groups have one key": Fault(NOISY, MeshContext, "row_group", lambda _: lambda self: 0),
  "a total forgets an axis": Fault(BOTH, MeshContext, "psum_tokens", total_of_less),
  "labels are counted by device": Fault(DATA, MeshContext, "psum_tokens", counts_of_each),
  "drops are counted by device": Fault(CAPACITY, LossPieces, "_over_devices", drops_of_each),
  "a router learns from one device's load": Fault(
    AUX_FREE, LossPieces, "_over_devices", lambda _: lambda self, sums: sums
  ),
  "the balance loss grows with an axis": Fault(
    DATA, MeshContext, "num_token_groups", property_of(lambda groups: 1)
  ),
  "gradients miss an axis": Fault(
    BOTH, ReduceScatter, "__init__", sums_over(lambda path, axes: axes[:-1])
  ),
  "gradients of norms miss the tensor axis": Fault(
    TENSOR, ReduceScatter, "__init__", sums_over(lambda path, axes: ())
  ),
  "gradients of experts are summed over other experts": Fault(
    EXPERT, ReduceScatter, "__init__", sums_over(lambda path, axes: ("expert",))
  ),
  "gradients are divided once too often": Fault(DATA, ReduceScatter, "finalize", divided),
  "a reduce-scatter is a slice": Fault(ZERO_2, ReduceScatter, "_scattered", cut_not_summed),
  "gathered weights are out of order": Fault(ZERO_3, ParamGatherer, "_gather", gathered_in_turn),
  "gathered weights are detached": Fault(ZERO_3, ParamGatherer, "_gather", gathered_for_good),
  "axes of experts are swapped": Fault(
    FOLD_DATA, MeshContext, "expert_mesh", property_of(lambda mesh: (mesh[0][::-1], mesh[1][::-1]))
  ),
  **{name: Fault(*fault) for name, fault in _ELSEWHERE.items()},
}


def shown(name: str) -> dict[str, float]:
  """Returns what a fault makes wrong in its cell, or the line that refuses it.

  Raises:
    AssertionError: the cell is red without the fault, or green with it.
  """
  fault = FAULTS[name]
  before = wrong_without(fault.cell)
  assert not before, f"{fault.cell.key} is red without a fault: {before}"
  with fault.planted():
    try:
      found = wrong(fault.cell)
    except InputError as refusal:
      found = {str(refusal): math.inf}
  assert found, f"{fault.cell.key} stays green where {name}"
  return found


def main(pattern: str = "*") -> int:
  """Prints the table; returns 0 if every fault shows."""
  missed = 0
  for name, fault in FAULTS.items():
    if fnmatch.fnmatch(name, pattern):
      try:
        told = ", ".join(f"{what} {value:.1e}" for what, value in shown(name).items())
      except AssertionError as error:
        missed, told = missed + 1, f"MISSED: {error}"
      print(f"{name:<55}  {fault.cell.key:<55}  {told}", flush=True)
  return 1 if missed else 0


if __name__ == "__main__":
  os.environ.setdefault("NPROC", "16")  # a device that waits in a collective holds a thread
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  sys.exit(main(*sys.argv[1:]))
