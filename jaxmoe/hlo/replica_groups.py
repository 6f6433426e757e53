"""Replica groups of collectives, in all notations of HLO."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from jaxmoe.hlo.text import Instruction

ReplicaGroups = tuple[tuple[int, ...], ...]
"""Sets of devices, as places in a mesh, that exchange among themselves."""

_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")


def mesh_axes(groups: ReplicaGroups, mesh: Mesh) -> tuple[str, ...] | None:
  """Returns the mesh axes whose product every group is, or None; groups hold places in the mesh."""
  shape = mesh.devices.shape
  found = set()
  for group in groups:
    coordinates = np.array(np.unravel_index(np.array(group), shape))
    varying = np.ptp(coordinates, axis=1) > 0
    if len(set(group)) != math.prod(size for size, varies in zip(shape, varying) if varies):
      return None
    found.add(tuple(axis for axis, varies in zip(mesh.axis_names, varying) if varies))
  return found.pop() if len(found) == 1 else None


def connected_devices(pairs: ReplicaGroups) -> ReplicaGroups:
  """Returns the sets of devices that (source, target) pairs connect."""
  sets: list[set[int]] = []
  for pair in pairs:
    touched = [group for group in sets if group & set(pair)]
    sets = [group for group in sets if group not in touched] + [set(pair).union(*touched)]
  return tuple(sorted(tuple(sorted(group)) for group in sets))


def groups_along(
  sizes: Mapping[str, int], axes: Sequence[tuple[str, int, int]], ids: np.ndarray | None = None
) -> ReplicaGroups:
  """Returns the groups of devices that differ along some axes, or digits of axes, alone.

  Args:
    sizes: Of all axes of a mesh, outermost first.
    axes: (name, before, size): the digit of that size of an axis that is seen as `before` x `size`
      x the rest; (name, 1, its whole size) for all of it. The last one counts fastest in a group.
    ids: The devices of the mesh in order; None for 0, 1, 2 and so on.
  """
  ids = np.arange(math.prod(sizes.values())) if ids is None else ids.ravel()
  names = list(sizes)
  groups: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = {}
  for number, place in zip(ids.tolist(), np.ndindex(*sizes.values()), strict=True):
    left, digits = list(place), []
    for name, before, size in axes:
      at, rest = names.index(name), sizes[name] // (before * size)
      digits.append(place[at] // rest % size)
      left[at] -= digits[-1] * rest
    groups.setdefault(tuple(left), []).append((tuple(digits), number))
  return tuple(tuple(number for _, number in sorted(group)) for group in groups.values())


def permute_pairs(instruction: Instruction) -> ReplicaGroups:
  """Returns which device sends to which in a permute; nothing for other collectives."""
  pairs = instruction.attribute(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}")
  return _lists(pairs) if pairs else ()


def replica_groups(instruction: Instruction, num_devices: int) -> ReplicaGroups:
  """Returns who exchanges with whom, from any of the notations of HLO."""
  pairs = permute_pairs(instruction)
  if pairs:
    return connected_devices(pairs)
  listed = instruction.attribute(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
  if listed:
    return _lists(listed)
  if listed is not None or "replica_groups=" not in instruction.attributes:
    return (tuple(range(num_devices)),)
  iota = instruction.attribute(r"replica_groups=(\[[\d,]+\]<=\S+?)(?:, |$)")
  if iota is not None:
    shape, order = iota.split("<=")
    return tuple(map(tuple, _iota(order).reshape(_numbers(shape)[0], -1).tolist()))
  named = _NAMED.search(instruction.attributes)
  if named is None:
    raise ValueError(f"replica_groups in a notation that is not known: {instruction.attributes}")
  mesh, order, axes = named.groups()
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
  digits = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
  along = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in digits]
  return groups_along(sizes, along, None if order is None else _iota(order))


def _iota(text: str) -> np.ndarray:
  """Returns the devices of `[2,4]T(1,0)`, 0 to 7 in that shape, transposed; or of a list."""
  if not text.startswith("["):
    return np.array(_numbers(text))
  dims, _, order = text.partition("T")
  shape = _numbers(dims)
  return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(order) or range(len(shape)))


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


def _lists(text: str) -> ReplicaGroups:
  groups = re.findall(r"\{([\d,]+)\}", text)
  return tuple(tuple(int(n) for n in group.split(",")) for group in groups)
