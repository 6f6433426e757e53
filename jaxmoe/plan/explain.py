"""Explanation of a recipe: sharding of every array, collectives, FLOPs and memory of a step.

Nothing is allocated: shapes are traced and, unless that is left out, the step of the run is
compiled. All numbers are one device's; the shardings are whatever the layout gives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxmoe.core import param_names
from jaxmoe.core.backends import Choice, ChoiceLog
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import Layout
from jaxmoe.hlo.compiled import Collective, CompiledMemory, Flops, collectives, flops, memory
from jaxmoe.hlo.stablehlo import collectives_of_lowered
from jaxmoe.models.transformer import Decoder
from jaxmoe.parallel import Replicated
from jaxmoe.plan.activations import Activations, activations
from jaxmoe.plan.pipeline_slots import slot_bytes
from jaxmoe.plan.pipeline_summary import PipelineSummary, pipeline_summary
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.replication_check import check_replication
from jaxmoe.train.step import abstract_batch, abstract_state, lower_step
from jaxmoe.train.train_state import StateSpec


@dataclasses.dataclass(frozen=True)
class ParamPlacement:
  """A parameter: the same one of all layers that are stacked in memory.

  Attributes:
    name: Of the layers it stands for, such as `layers/0..31/moe/experts/down`.
    dims: Its logical dims.
    shape: Its whole shape.
    axes: The mesh axes of each dim.
    bytes: What one device holds.
    whole: What all of it takes.
  """

  name: str
  dims: tuple[str | None, ...]
  shape: tuple[int, ...]
  axes: tuple[tuple[str, ...], ...]
  bytes: int
  whole: int


@dataclasses.dataclass(frozen=True)
class ArrayBytes:
  """Bytes of one kind of array: on one device, and of the whole."""

  bytes: int
  whole: int


@dataclasses.dataclass(frozen=True)
class Traffic:
  """All collectives of one kind over the same axes with the same dtype.

  Attributes:
    kind: See `Collective`.
    over: The mesh axes.
    dtype: As the program has it.
    count: How many run in a step.
    bytes_out: What their results take on one device, in all.
    wire_bytes: What one device sends, in all.
    known: Whether the count is; a loop of unknown length counts once.
    sometimes: Whether some stand in a branch of a conditional.
  """

  kind: str
  over: str
  dtype: str
  count: int
  bytes_out: int
  wire_bytes: float
  known: bool
  sometimes: bool


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of the step.

  Attributes:
    memory: Of one device.
    unread: Bytes of what a step is given and never reads; they are no part of the arguments.
    flops: Of one device and step.
    traffic: What the compiled program sends.
    asked: What the code asks for, in its own dtypes; what the partitioner adds is not in it.
  """

  memory: CompiledMemory
  unread: int
  flops: Flops
  traffic: tuple[Traffic, ...]
  asked: tuple[Traffic, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What `jaxmoe explain` tells.

  Attributes:
    mesh: The degree of each axis.
    device: The kind of the devices.
    weights: Every parameter.
    held: What a step is given, by kind: parameters, optimizer, rest of the state, batch.
    file: What the parameters would take in the dtype of a file, `model.param_dtype`.
    model_flops: Of one step on all devices, as MFU counts them: no recomputation.
    activations: What the layers make.
    copies: Of what several devices hold alike in a forward pass, the largest by axes.
    compiled: What the compiler says; None where it was not asked.
    room: Bytes of memory that a device has, where that is known.
    kernels: The back ends that the step is computed by, and why.
    pipeline: Ticks, slots and bubble of the pipeline; None without one.
  """

  mesh: dict[str, int]
  device: str
  weights: tuple[ParamPlacement, ...]
  held: dict[str, ArrayBytes]
  file: ArrayBytes
  model_flops: float
  activations: Activations
  copies: tuple[Replicated, ...]
  compiled: Compiled | None
  room: int | None = None
  kernels: tuple[Choice, ...] = ()
  pipeline: PipelineSummary | None = None

  @property
  def fits(self) -> bool | None:
    """Whether the compiled step fits in a device's memory; None where one is not known."""
    if self.room is None or self.compiled is None:
      return None
    return self.compiled.memory.peak <= self.room

  @property
  def arguments(self) -> int:
    """Bytes of one device that a step is given."""
    return sum(held.bytes for held in self.held.values())

  def record(self) -> dict[str, Any]:
    """Returns all of it as JSON has it."""
    return {**dataclasses.asdict(self), "arguments": self.arguments, "fits": self.fits}


def explain(
  experiment: Experiment,
  layout: Layout,
  compiles: bool = True,
  say: Callable[[str], None] = lambda line: None,
  room: int | None = None,
) -> Explanation:
  """Returns what a run of a recipe on a layout needs.

  Args:
    experiment: The recipe.
    layout: Where arrays lie.
    compiles: Whether the step is compiled.
    say: Told what takes long.
    room: Bytes of memory of a device, where that is known.

  Raises:
    InputError: a dim does not divide by the degree of its axes, or devices hold the same large
      activation.
  """
  choices = ChoiceLog()
  decoder = experiment.decoder(layout, log=choices)
  window = experiment.train.recovery.spike_window
  masters = experiment.masters(decoder)
  spec = StateSpec(decoder, experiment.transform(decoder), layout, window, masters)
  state, batch = abstract_state(spec), abstract_batch(experiment, layout)
  rest = dataclasses.replace(state, params={}, optimizer={})
  length = experiment.data.seq_len
  per_token = experiment.model.train_flops_per_token(decoder.vocab_size, length)
  found = None
  made = activations(experiment, decoder, layout)
  alike = check_replication(experiment, decoder, layout)
  kernels = choices.take()  # of a device's share of a batch, as the step's are
  if compiles:
    say("lowering the step")
    lowered = lower_step(experiment, decoder, spec, layout, state, batch)
    found, kernels = _compiled(lowered, (state, batch), layout, say), choices.take()
  return Explanation(
    mesh=dict(layout.mesh.shape),
    device=layout.mesh.devices.flat[0].device_kind,
    weights=tuple(_weights(decoder, state.params)),
    held={
      "parameters": _held(state.params),
      "optimizer": _held(state.optimizer),
      "counters": _held(rest),
      "batch": _held(batch),
    },
    file=_held(jax.tree.map(_as_declared, decoder.shapes, state.params)),
    model_flops=per_token * experiment.train.batch_size * length,
    activations=made,
    copies=tuple(_largest(alike)),
    compiled=found,
    room=room,
    kernels=kernels,
    pipeline=pipeline_summary(
      experiment, decoder.vocab_size, made.stream, slot_bytes(experiment, decoder, layout)
    ),
  )


def _largest(found: Iterable[Replicated]) -> Iterable[Replicated]:
  """Returns the first by the axes along which they are the same."""
  first: dict[tuple[str, ...], Replicated] = {}
  for one in found:
    first.setdefault(one.axes, one)
  return first.values()


def traffic(found: Iterable[Collective]) -> tuple[Traffic, ...]:
  """Returns collectives by kind, axes and dtype, those that send the most first."""
  groups: dict[tuple[str, str, str], list[Collective]] = {}
  for one in found:
    groups.setdefault((one.kind, one.over, one.dtype), []).append(one)
  summed = [
    Traffic(
      *key,
      count=sum(one.times for one in group),
      bytes_out=sum(one.times * one.bytes_out for one in group),
      wire_bytes=sum(one.total_wire_bytes for one in group),
      known=all(one.known for one in group),
      sometimes=any(one.sometimes for one in group),
    )
    for key, group in groups.items()
  ]
  return tuple(sorted(summed, key=lambda one: (-one.wire_bytes, -one.count)))


def compile_for(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """Returns the compiled program.

  Raises:
    InputError: the compiler says that a device has too little memory for it.
  """
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    why = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
    raise InputError(
      f"the step does not fit: {why}; take more devices or smaller microbatches; --nocompile "
      "prints the tables alone"
    ) from None


def unread_bytes(compiled: jax.stages.Compiled, given: tuple[Any, ...]) -> int:
  """Returns the bytes on one device of arguments that a program was lowered with and leaves out."""
  kept = jax.tree.leaves(compiled.input_shardings[0], is_leaf=lambda leaf: leaf is None)
  pairs = zip(jax.tree.leaves(given), kept, strict=True)
  return _held([leaf for leaf, sharding in pairs if sharding is None]).bytes


def _compiled(
  lowered: jax.stages.Lowered, given: tuple[Any, ...], layout: Layout, say: Callable[[str], None]
) -> Compiled:
  asked = traffic(collectives_of_lowered(lowered, layout.mesh))
  say("compiling the step")
  compiled = compile_for(lowered)
  sent = traffic(collectives(compiled, layout.mesh))
  return Compiled(memory(compiled), unread_bytes(compiled, given), flops(compiled), sent, asked)


def _weights(decoder: Decoder, params: Any) -> Iterable[ParamPlacement]:
  """Yields the parameters in the order of the tree."""
  dims = param_names.flatten(_boxed(decoder.dims))
  for path, leaf in param_names.flatten(params).items():
    spec = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
    held = _held(leaf)
    yield ParamPlacement(
      name=_name(path, decoder),
      dims=dims[path].dims,
      shape=leaf.shape,
      axes=tuple((axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec),
      bytes=held.bytes,
      whole=held.whole,
    )


@dataclasses.dataclass(frozen=True)
class _Dims:
  dims: tuple[str | None, ...]


def _boxed(dims: Any) -> Any:
  """Returns a tree of dims whose tuples are leaves."""
  return jax.tree.map(_Dims, dims, is_leaf=lambda node: isinstance(node, tuple))


def _name(path: str, decoder: Decoder) -> str:
  """Returns a leaf's canonical name; of a stacked one `layers/0..31/...`, `layers/1,3..31/...`."""
  stacked = param_names.layer_names(path, decoder.layer_groups)
  if stacked is None:
    return path
  stacked = [name for name in stacked if name]
  before, _, after = stacked[0].partition(f"{param_names.LAYERS}/")
  depths = [int(name.removeprefix(before).split("/")[1]) for name in stacked]
  shown = f"{depths[0]}..{depths[-1]}"
  if len(depths) < 3:
    shown = ",".join(map(str, depths))
  elif depths[1] - depths[0] > 1:
    shown = f"{depths[0]},{depths[1]}..{depths[-1]}"
  return f"{before}{param_names.LAYERS}/{shown}/{after.partition('/')[2]}"


def _as_declared(declared: Any, kept: Any) -> jax.ShapeDtypeStruct:
  """Returns a parameter as it lies in memory, in the dtype that its model declares."""
  return jax.ShapeDtypeStruct(kept.shape, declared.dtype, sharding=kept.sharding)


def _held(tree: Any) -> ArrayBytes:
  """Returns the bytes of shapes that carry shardings."""
  leaves = jax.tree.leaves(tree)
  return ArrayBytes(
    sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves),
    sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
  )
