"""Layout: a mesh, and for each role the rules from logical dims to mesh axes.

Leaves carry the names of their logical dims as plain metadata (`nnx.Param(x, dims=('embed',
'mlp'))`); only a Layout turns them into shardings. Parallelism of every kind is another Layout; the
one-device Layout has no rules, so that the same program runs on a laptop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmoe.core.errors import InputError

Dims = tuple[str | None, ...]
Role = Literal["params", "grads", "optimizer", "activations", "cache"]
Rules = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where every array of a run lives: `rules[role][logical dim]` are mesh axes."""

  mesh: Mesh
  rules: Mapping[Role, Rules] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    for role, rules in self.rules.items():
      for dim, axes in rules.items():
        missing = [axis for axis in axes if axis not in self.mesh.axis_names]
        if missing:
          raise InputError(
            f"layout rule {role}.{dim} names mesh axes {missing}; "
            f"the mesh has {self.mesh.axis_names}"
          )

  def spec(self, role: Role, dims: Dims) -> PartitionSpec:
    """Returns the mesh axes of each dim; a dim without a rule is replicated.

    A mesh axis shards one dim of an array at most: the first dim that asks for it has it.
    """
    rules = self.rules.get(role, {})
    used: set[str] = set()
    parts: list[tuple[str, ...] | str | None] = []
    for dim in dims:
      axes = tuple(axis for axis in rules.get(dim, ()) if axis not in used) if dim else ()
      used.update(axes)
      parts.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*parts)

  def sharding(self, role: Role, dims: Dims, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of an array whose dims have these logical names and this shape.

    Raises:
      InputError: a dim does not divide by the degree of its mesh axes.
    """
    if len(dims) != len(shape):
      raise InputError(f"an array of shape {shape} cannot have the dims {dims}")
    spec = self.spec(role, dims)
    for dim, size, axes in zip(dims, shape, spec):
      names = (axes,) if isinstance(axes, str) else axes or ()
      degree = math.prod(self.mesh.shape[axis] for axis in names)
      if size % degree:
        raise InputError(
          f"dim {dim!r} of size {size} does not divide by {degree}, the degree of {names}; "
          "change the size or the degree"
        )
    return NamedSharding(self.mesh, spec)

  def shardings(self, role: Role, dims: Any, shapes: Any) -> Any:
    """Returns the tree of shardings for trees of dims and of shaped leaves."""
    return jax.tree.map(
      lambda leaf, names: self.sharding(role, names, leaf.shape), shapes, dims
    )

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns this process's rows of a batch, (B, L) each, as global arrays on the devices."""
    spec = self.spec("activations", ("batch", "length"))
    sharding = NamedSharding(self.mesh, spec)
    return {
      name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }

  @property
  def replicated(self) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(self.mesh, PartitionSpec())


def one_device(device: jax.Device | None = None) -> Layout:
  """Returns the Layout that keeps everything on one device (the first by default)."""
  device = jax.devices()[0] if device is None else device
  mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
  return Layout(mesh)
