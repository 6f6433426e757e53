"""Layout: a mesh, and for each role the rules from logical dims to mesh axes.

Leaves carry the names of their logical dims as plain metadata (`nnx.Param(x, dims=('embed',
'mlp'))`); only a Layout turns them into shardings. Parallelism of every kind is another Layout; the
one-device Layout has no rules, so that the same program runs on a laptop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmoe.core.errors import InputError
from jaxmoe.core.param_names import flatten

Dims = tuple[str | None, ...]
Role = Literal["params", "grads", "optimizer", "activations", "cache"]
Rules = Mapping[str, tuple[str, ...]]
LAYER, EXPERT = "layer", "expert"
EXPERT_DIMS = (EXPERT, "local_expert")
"""What dims of experts are called; `local_expert` of those that work where their tokens are."""
ONCE = "once"
"""What the dim of a bias is called that is added to a product of which devices have parts.

The parts are summed, so the bias must count on one device of them; the layout sees to it.
"""


def is_dims(node: Any) -> bool:
  """Says whether a node of a tree of dims is the dims of a leaf."""
  return isinstance(node, tuple) and all(dim is None or isinstance(dim, str) for dim in node)


def dims_by_path(dims: Any, params: Any) -> dict[str, Dims]:
  """Returns {path: dims} of a tree like `params` of dims."""
  return dict(zip(flatten(params), jax.tree.leaves(dims, is_leaf=is_dims), strict=True))


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where every array of a run lives: `rules[role][logical dim]` are mesh axes.

  A rule for `expert` holds where that is the first dim of a layer's leaf, as of what experts are
  made of; a gate, which has it last, is not spread by it.

  Attributes:
    mesh: The devices.
    rules: By role and dim.
    sharded: By role: axes over which each array is spread besides, along its largest dim that is
      free and divides; whole where there is none. Never along layers, which are taken one by one.
    may_replicate: Dims that stay whole where they do not divide by the degree of their axes; others
      are refused.
    order_columns: Puts the columns of a batch in the order in which devices have them, and says the
      slot of each; None where they are in order of time.
  """

  mesh: Mesh
  rules: Mapping[Role, Rules] = dataclasses.field(default_factory=dict)
  sharded: Mapping[Role, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  may_replicate: frozenset[str] = frozenset()
  order_columns: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None = None

  def __post_init__(self) -> None:
    for role, rules in self.rules.items():
      for dim, axes in rules.items():
        missing = [axis for axis in axes if axis not in self.mesh.axis_names]
        if missing:
          raise InputError(
            f"layout rule {role}.{dim} names mesh axes {missing}; "
            f"the mesh has {self.mesh.axis_names}"
          )

  def spec(
    self, role: Role, dims: Dims, shape: tuple[int, ...] | None = None
  ) -> PartitionSpec:
    """Returns the mesh axes of each dim, those of one device left out.

    A dim without a rule is replicated.

    A mesh axis shards one dim of an array at most: the first dim that asks for it has it.

    Args:
      role: What the array is for.
      dims: Its logical dims.
      shape: Its shape, which `sharded` and `may_replicate` need; None for the rules alone.

    Raises:
      InputError: a dim does not divide by the degree of its mesh axes.
    """
    rules = self.rules.get(role, {})
    first = 1 if dims[:1] == (LAYER,) else 0
    parts: list[tuple[str, ...]] = []
    used: set[str] = set()
    for at, dim in enumerate(dims):
      ruled = rules.get(dim, ()) if dim and (dim != EXPERT or at == first) else ()
      axes = tuple(axis for axis in ruled if axis not in used and self.mesh.shape[axis] > 1)
      if shape is not None and not self._divides(dim, shape[at], axes):
        axes = ()
      used.update(axes)
      parts.append(axes)
    wanted = self.sharded.get(role, ())
    more = tuple(axis for axis in wanted if axis not in used and self.mesh.shape[axis] > 1)
    if shape is not None and more:
      free = [at for at in range(first, len(dims)) if not parts[at]]
      fits = [at for at in free if shape[at] and shape[at] % self.degree(more) == 0]
      if fits:
        parts[max(fits, key=lambda at: shape[at])] = more
    return PartitionSpec(*(
      axes if len(axes) > 1 else axes[0] if axes else None for axes in parts
    ))

  def degree(self, axes: tuple[str, ...]) -> int:
    """Returns the number of devices along these axes together."""
    return math.prod(self.mesh.shape[axis] for axis in axes)

  def sharding(self, role: Role, dims: Dims, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of an array whose dims have these logical names and this shape.

    Raises:
      InputError: a dim does not divide by the degree of its mesh axes.
    """
    if len(dims) != len(shape):
      raise InputError(f"an array of shape {shape} cannot have the dims {dims}")
    return NamedSharding(self.mesh, self.spec(role, dims, shape))

  def shardings(self, role: Role, dims: Any, shapes: Any) -> Any:
    """Returns the tree of shardings for trees of dims and of shaped leaves."""
    return jax.tree.map(
      lambda leaf, names: self.sharding(role, names, leaf.shape), shapes, dims
    )

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns this process's rows of a batch, (B, L) each, as global arrays on the devices.

    Rows are whole; where their columns lie on several processes, each takes its own.
    """
    spec = self.spec("activations", ("batch", "length"))
    sharding = NamedSharding(self.mesh, spec)
    batch = batch if self.order_columns is None else self.order_columns(batch)
    return {name: _put_rows(sharding, rows) for name, rows in batch.items()}

  def _divides(self, dim: str | None, size: int, axes: tuple[str, ...]) -> bool:
    """Whether a dim can be spread over axes; False where it may stay whole instead."""
    degree = self.degree(axes)
    if size % degree == 0:
      return True
    if dim in self.may_replicate:
      return False
    raise InputError(
      f"dim {dim!r} of size {size} does not divide by {degree}, the degree of {axes}; "
      "change the size or the degree"
    )

  @property
  def replicated(self) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(self.mesh, PartitionSpec())


def _put_rows(sharding: NamedSharding, rows: np.ndarray) -> jax.Array:
  """Returns whole rows, (B, L), as a global array of which this process gives its columns."""
  shape = (len(sharding.mesh.devices.flat), rows.shape[1])  # any rows: columns are asked for
  of_columns = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
  here = of_columns.addressable_devices_indices_map(shape).values()
  bounds = [index[1].indices(rows.shape[1])[:2] for index in here if index is not None]
  start, stop = min(low for low, _ in bounds), max(high for _, high in bounds)
  return jax.make_array_from_process_local_data(sharding, rows[:, start:stop])


def one_device(device: jax.Device | None = None) -> Layout:
  """Returns the Layout that keeps everything on one device (the first by default)."""
  device = jax.devices()[0] if device is None else device
  mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
  return Layout(mesh)
