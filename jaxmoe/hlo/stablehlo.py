"""Collectives of a program that is not compiled yet (StableHLO), by mesh axes.

Here are the collectives that the code itself asks for, in their own dtypes, before XLA merges,
moves or widens any; those that GSPMD adds when it compiles are not. Loops count as JAX writes
them: a counter from a constant, by one, below a constant.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmoe.hlo.compiled import KINDS, Collective
from jaxmoe.hlo.replica_groups import ReplicaGroups, connected_devices, groups_along, mesh_axes
from jaxmoe.hlo.text import ArrayShape


def collectives_of_lowered(lowered: jax.stages.Lowered, mesh: Mesh) -> list[Collective]:
  """Returns every collective of a lowered program, in the order of its text."""
  module: Any = lowered.compiler_ir("stablehlo")
  functions = {
    str(operation.attributes["sym_name"]).strip('"'): operation
    for operation in module.body.operations
    if operation.operation.name == "func.func"
  }
  around = _Context(functions, mesh)
  return list(_collectives(functions["main"], around))


@dataclasses.dataclass(frozen=True)
class _Context:
  """Where an operation stands; see `Collective`."""

  functions: dict[str, Any]
  mesh: Mesh
  times: int = 1
  known: bool = True
  sometimes: bool = False


def _collectives(operation: Any, around: _Context) -> Iterator[Collective]:
  """Yields what an operation and all within and behind it send."""
  name = operation.operation.name
  called = operation.attributes["call_target_name"] if name == "stablehlo.custom_call" else name
  kind = str(called).strip('"').removeprefix("stablehlo.").replace("_", "-")
  if kind in KINDS:
    yield _collective(operation, kind, around)
    return
  if name == "func.call":
    callee = str(operation.attributes["callee"]).removeprefix("@").strip('"')
    yield from _collectives(around.functions[callee], around)
  if name == "stablehlo.while":
    passes = _trips(operation)
    times = around.times * (1 if passes is None else passes)
    around = dataclasses.replace(around, times=times, known=around.known and passes is not None)
  if name in ("stablehlo.case", "stablehlo.if"):
    around = dataclasses.replace(around, sometimes=True)
  for region in operation.operation.regions:
    for block in region.blocks:
      for inner in block.operations:
        yield from _collectives(inner, around)


def _collective(operation: Any, kind: str, around: _Context) -> Collective:
  shapes = [_shape(str(result.type)) for result in operation.operation.results]
  listed, is_pairs = _groups(operation, around.mesh)
  groups = connected_devices(listed) if is_pairs else listed
  return Collective(
    kind=kind,
    axes=mesh_axes(groups, around.mesh),
    groups=groups,
    shape=shapes[0].dims,
    dtype="+".join(dict.fromkeys(shape.dtype for shape in shapes)),
    bytes_out=sum(shape.bytes for shape in shapes),
    times=around.times,
    known=around.known,
    sometimes=around.sometimes,
    scope=str(operation.operation.location),
    pairs=listed if is_pairs else (),
  )


def _groups(operation: Any, mesh: Mesh) -> tuple[ReplicaGroups, bool]:
  """Returns who exchanges with whom, or pairs of a permute, and which; -1 fills short groups."""
  attributes = operation.operation.attributes
  if operation.operation.name == "stablehlo.custom_call":  # a ragged all-to-all is written as one
    attributes = attributes["backend_config"]
  is_pairs = "source_target_pairs" in attributes
  found = attributes["source_target_pairs" if is_pairs else "replica_groups"]
  if "mesh_axes" in str(found):  # jax 0.11 names axes where earlier ones list devices
    axes = re.findall(r'name = "(\w+)"', str(found))
    return groups_along(mesh.shape, [(axis, 1, mesh.shape[axis]) for axis in axes]), False
  rows, columns = map(int, re.findall(r"\d+", str(found.type))[:2])
  flat = [int(value) for value in found]
  groups = tuple(
    tuple(place for place in flat[row * columns : (row + 1) * columns] if place >= 0)
    for row in range(rows)
  )
  return groups or (tuple(range(mesh.devices.size)),), is_pairs


def _shape(text: str) -> ArrayShape:
  """Returns the shape of `tensor<4x2xbf16>`."""
  *dims, dtype = text.removeprefix("tensor<").removesuffix(">").split("x")
  return ArrayShape(dtype, tuple(map(int, dims)))


def _trips(loop: Any) -> int | None:
  """Returns how often the body of a loop runs, or None if that is not known."""
  condition, body = (region.blocks[0] for region in loop.operation.regions)
  test = _maker(_returned(condition)[0], "stablehlo.compare")
  if test is None or "LT" not in str(test.attributes["comparison_direction"]):
    return None
  at, limit = _place(test.operands[0], condition), _constant(test.operands[1])
  if at is None or limit is None:
    return None
  start = _constant(loop.operation.operands[at])
  step = _maker(_returned(body)[at], "stablehlo.add")
  if start is None or step is None or _place(step.operands[0], body) != at:
    return None
  return max(limit - start, 0) if _constant(step.operands[1]) == 1 else None


def _returned(block: Any) -> list[Any]:
  """Returns the values that a block ends with."""
  return list(list(block.operations)[-1].operation.operands)


def _maker(value: Any, name: str) -> Any:
  """Returns the operation of that name that makes a value, or None."""
  owner = value.owner
  return owner if getattr(owner, "name", None) == name else None


def _place(value: Any, block: Any) -> int | None:
  """Returns which argument of a block a value is, or None."""
  places = [place for place, argument in enumerate(block.arguments) if argument == value]
  return places[0] if places else None


def _constant(value: Any) -> int | None:
  """Returns the integer that a value is, or None."""
  maker = _maker(value, "stablehlo.constant")
  text = "" if maker is None else str(maker.attributes["value"])
  found = re.fullmatch(r"dense<(-?\d+)> : tensor<\w+>", text)
  return int(found.group(1)) if found else None
