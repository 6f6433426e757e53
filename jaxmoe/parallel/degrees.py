"""The degrees of parallelism of a recipe, and the mesh of devices they ask for.

Axes of the mesh, outermost first: `pipe` (stages of the stack), `data` (replicas), `fsdp` (data
too; the state of the optimizer, gradients and parameters are spread over it by the ZeRO stage),
`expert` (data too; experts are spread over it), `context` (the tokens of a row are spread over it),
`tensor` (heads, hidden units and the vocabulary are spread over it; all its devices see the same
tokens).

The innermost devices lie nearest to each other, and what they exchange grows inwards: a stage sends
its stream once a microbatch, replicas sum gradients once a step, context devices send keys and
values once a layer, tensor devices the stream four times a layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxmoe.core.config_io import added
from jaxmoe.core.errors import InputError
from jaxmoe.core.renamed import renamed
from jaxmoe.parallel.block_order import Order
from jaxmoe.parallel.pipelines.columns import Keep

AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")
ROW_AXES = ("data", "fsdp", "expert")
"""Axes whose devices hold different rows; a batch's rows lie on them in this order."""
TOKEN_AXES = (*ROW_AXES, "context")
"""Axes whose devices hold different tokens: other rows, or other parts of a row."""


@dataclasses.dataclass(frozen=True)
class AxisNames:
  """The names of the mesh axes, outermost first; all other code takes them from here."""

  pipe: str = "pipe"
  data: str = "data"
  fsdp: str = "fsdp"
  expert: str = "expert"
  context: str = "context"
  tensor: str = "tensor"


Stage = Literal[0, 1, 2, 3]
Fold = Literal["data", "fsdp", "context", "tensor"]
Attend = Literal["gather", "ring", "token_ring", "ulysses"]
HeadPlace = Literal["last", "one_barrier", "two_barriers"]


@dataclasses.dataclass(frozen=True)
class Parallel:
  """How a run is spread over devices: the degree of each axis, and what is spread over it.

  Attributes:
    data: Replicas.
    fsdp: Devices over which state is spread by `zero`.
    expert: Devices over which experts are spread; others hold the same tokens' dense layers.
    tensor: Devices over which heads, hidden units and the vocabulary are spread.
    zero: The ZeRO stage (Rajbhandari et al. 2019): over `fsdp` lie nothing (0), the optimizer's
      state (1), gradients too (2), parameters too (3).
    sequence: Whether the residual stream is spread over `tensor` along the sequence (Korthikanti
      et al. 2022), so that an all-reduce is a reduce-scatter and an all-gather.
    partition_activations: Whether each of the `tensor` devices, on all of which the stream is the
      same, keeps a part of it between layers for the backward pass, which gathers it again (ZeRO-R,
      Rajbhandari et al. 2019, section 6.1). With `sequence` it lies in parts anyway.
    fold: More axes over whose devices experts are spread, so that their layout does not depend on
      that of dense layers.
    max_replicated_gib: How large an activation may be, in GiB, of which several devices hold the
      same copy; a recipe whose layout makes a larger one is refused.
    context: Devices over which the tokens of a row are spread.
    attend: How queries meet the keys of other context devices: every device gets the keys of all
      (`gather`), keys travel (`ring`) or queries do (`token_ring`), one part at a time, or heads
      are exchanged for tokens (`ulysses`).
    order: Which tokens of a row a context device has: one stretch (`plain`), a block from either
      end (`zigzag`), or blocks by what the documents let them see (`balanced`).
    pipe: Devices over which the layers are spread in stages.
    pipeline: The order of a stage's passes: a name of PIPELINES (`parallel/pipelines`), a CSV file,
      or the text of one, which the config.json of a run has in its place.
    stages: How many layers each stage has, in order; none to cut them by the FLOPs of products.
    head: Where the vocabulary lies under a pipeline: embedding on the first stage and head on the
      `last`, or both over all devices of `pipe` and `tensor` (Yeung et al. 2024), which wait for
      each other at `one_barrier` of a microbatch (algorithm 2) or at `two_barriers` (1).
    keep: What a stage keeps of a microbatch for its backward pass under a pipeline: its `input`,
      from which that makes the stage again, or `residuals`, so that nothing is made twice.
  """

  axes: ClassVar[AxisNames] = AxisNames()

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  zero: Stage = 3
  sequence: bool = False
  partition_activations: bool = False
  fold: tuple[Fold, ...] = ()
  max_replicated_gib: float = renamed("max_copy_gib", 2.0)
  context: int = added(1, before=1)
  pipe: int = added(1, before=1)
  attend: Attend = added("gather", before="gather")
  order: Order = added("plain", before="plain")
  pipeline: str = added("1f1b", before="1f1b")
  stages: tuple[int, ...] = added((), before=())
  head: HeadPlace = added("last", before="last")
  keep: Keep = added("input", before="input")

  def __post_init__(self) -> None:
    for name, degree in self.axis_sizes.items():
      if degree < 1:
        raise InputError(f"a degree must be at least 1: {name}={degree}")
    if self.sequence and self.tensor == 1:
      raise InputError(
        "sequence=true spreads the stream over tensor devices, of which there is one: tensor=1; "
        "set tensor above 1, or sequence=false"
      )
    if self.partition_activations and (self.tensor == 1 or self.sequence):
      raise InputError(
        "partition_activations=true spreads over tensor devices what each of them would keep: "
        f"tensor={self.tensor}, sequence={self.sequence}; "
        + ("set tensor above 1" if self.tensor == 1 else "sequence=true spreads it already")
        + ", or partition_activations=false"
      )
    if self.stages and self.pipe == 1:
      raise InputError(
        f"stages cuts layers over pipe devices, of which there is one: stages={self.stages}; set "
        "pipe above 1, or stages=()"
      )
    if self.head != "last" and self.pipe == 1:
      raise InputError(
        f"head={self.head} spreads the vocabulary over pipe devices, of which there is one: "
        "pipe=1; set pipe above 1, or head=last"
      )
    if self.keep != "input" and self.pipe == 1:
      raise InputError(
        f"keep={self.keep} is what stages of a pipeline keep, of which there is one: pipe=1; set "
        "pipe above 1, or keep=input"
      )
    if not self.max_replicated_gib > 0:
      raise InputError(
        f"max_replicated_gib must be above 0: max_replicated_gib={self.max_replicated_gib}"
      )
    if len(set(self.fold)) < len(self.fold):
      raise InputError(f"fold names an axis twice: fold={self.fold}")

  @property
  def axis_sizes(self) -> dict[str, int]:
    """The degree of each axis of the mesh, outermost first."""
    names = dataclasses.asdict(self.axes)
    return {name: getattr(self, axis) for axis, name in names.items()}

  @property
  def mesh_shape(self) -> dict[str, int]:
    """The degree of each axis that the mesh has: `pipe` and `context` where they have devices.

    They came after the others: programs without them are, to the letter, what they were before.
    """
    later = (self.axes.pipe, self.axes.context)
    return {name: size for name, size in self.axis_sizes.items() if size > 1 or name not in later}

  @property
  def row_axes(self) -> tuple[str, ...]:
    """The axes whose devices hold different rows; a batch's rows lie on them in this order."""
    return tuple(getattr(self.axes, axis) for axis in ROW_AXES)

  @property
  def token_axes(self) -> tuple[str, ...]:
    """The axes of the mesh whose devices hold different tokens."""
    names = (getattr(self.axes, axis) for axis in TOKEN_AXES)
    return tuple(name for name in names if name in self.mesh_shape)

  @property
  def num_devices(self) -> int:
    """How many devices the mesh has."""
    return math.prod(self.axis_sizes.values())

  @property
  def num_row_groups(self) -> int:
    """On how many devices, or groups of context and tensor devices, different rows lie."""
    return math.prod(self.axis_sizes[axis] for axis in self.row_axes)

  @property
  def num_token_groups(self) -> int:
    """On how many devices, or groups of tensor devices, different tokens lie."""
    return math.prod(self.axis_sizes[axis] for axis in self.token_axes)

  @property
  def expert_axes(self) -> tuple[str, ...]:
    """The axes experts are spread over, outermost first."""
    return tuple(getattr(self.axes, axis) for axis in AXES if axis in ("expert", *self.fold))

  @property
  def vocab_axes(self) -> tuple[str, ...]:
    """The axes of the mesh over which the vocabulary is spread, outermost first."""
    axes = (self.axes.pipe,) * (self.head != "last") + (self.axes.tensor,)
    return tuple(axis for axis in axes if self.axis_sizes[axis] > 1)

  @property
  def expert_degree(self) -> int:
    """Over how many devices experts are spread."""
    return math.prod(self.axis_sizes[axis] for axis in self.expert_axes)


def make_mesh(parallel: Parallel, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the mesh of a recipe over the devices of all processes, or over the first of them.

  Raises:
    InputError: there are fewer devices than the degrees ask for, or several processes have more.
  """
  devices = jax.devices() if devices is None else devices
  need = parallel.num_devices
  processes = len({device.process_index for device in devices})
  if need > len(devices) or (processes > 1 and need != len(devices)):
    asked = " * ".join(f"{axis}={degree}" for axis, degree in parallel.mesh_shape.items())
    raise InputError(
      f"parallel asks for {need} devices ({asked}), {processes} process(es) have {len(devices)}; "
      f"set degrees whose product is {len(devices)}"
    )
  shape = parallel.mesh_shape
  grid = np.array(list(devices)[:need]).reshape(tuple(shape.values()))
  return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))
