"""Bytes that a compiled program moves between its operations, loops as often as they run.

An operation reads its operands and writes its result; what happens inside a fusion stays in
registers. Of an operand that is only sliced, the slices are read; of one that is updated in place,
the update is written. Caches of the processor are not modelled: a byte counts wherever it lies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax

from jaxmoe.hlo.text import Computation, HloProgram, Instruction, parse_program
from jaxmoe.hlo.trip_counts import Visit, visits

_FREE = (
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
  "while", "conditional", "call", "async-start", "async-update", "async-done",
  "partition-id", "replica-id", "opt-barrier",
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape")


@dataclasses.dataclass(frozen=True)
class Movement:
  """What one place of a program reads and writes.

  Attributes:
    opcode: Of the instruction.
    scope: The names of the code that made it.
    bytes: Of one run.
    times: How often it runs; a loop of unknown length counts once.
    known: Whether it stands in no loop of unknown length.
  """

  opcode: str
  scope: str
  bytes: int
  times: int
  known: bool

  @property
  def total(self) -> int:
    """Bytes of all runs."""
    return self.bytes * self.times


@dataclasses.dataclass(frozen=True)
class ProgramSize:
  """How many fusions and instructions a program has, wherever they are called from."""

  fusions: int
  instructions: int


def movements(compiled: jax.stages.Compiled) -> list[Movement]:
  """Returns what a compiled program moves, an instruction a line, in the order of its text."""
  return list(movements_of(parse_program(compiled.as_text() or "")))


def movements_of(program: HloProgram) -> Iterator[Movement]:
  """Yields what a program moves; instructions that move nothing are left out."""
  for visit in visits(program, into_fusions=False):
    moved = _moved(program, visit)
    if moved:
      found = visit.instruction
      yield Movement(found.opcode, found.scope, moved, visit.times, visit.known)


def program_size(compiled: jax.stages.Compiled) -> ProgramSize:
  """Returns how many instructions and fusions the text of a compiled program has."""
  found = [
    instruction.opcode
    for computation in parse_program(compiled.as_text() or "").computations.values()
    for instruction in computation.values()
  ]
  return ProgramSize(found.count("fusion"), len(found))


def _moved(program: HloProgram, visit: Visit) -> int:
  """Returns the bytes that one run of an instruction reads and writes."""
  found, beside = visit.instruction, visit.computation
  if found.opcode in _FREE or found.opcode.endswith("-done"):
    return 0
  if found.opcode == "fusion":
    (inside,) = found.called("calls")
    return _of_fusion(found, beside, program.computations[inside])
  if found.opcode in _SLICES:
    return 2 * _size(found)
  if found.opcode == "dynamic-update-slice":
    return 2 * _size(beside[found.operands[1]])
  if found.opcode == "scatter":
    updates = found.operands[(len(found.operands) + 1) // 2 :]
    return 3 * sum(_size(beside[name]) for name in updates)
  return _size(found) + sum(_size(beside[name]) for name in found.operands if name in beside)


def _of_fusion(fusion: Instruction, beside: Computation, inside: Computation) -> int:
  users: dict[str, list[Instruction]] = {}
  for instruction in inside.values():
    for name in instruction.operands:
      users.setdefault(name, []).append(instruction)
  total = 0
  for instruction in inside.values():
    if instruction.opcode == "parameter":
      operand = fusion.operands[int(instruction.inner)]
      total += _read(instruction, users, _size(beside[operand]))
  root = next(instruction for instruction in inside.values() if instruction.is_root)
  parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
  return total + sum(_written(part, inside) for part in parts)


def _read(value: Instruction, users: dict[str, list[Instruction]], whole: int) -> int:
  """Returns the bytes of a parameter of a fusion that are read, at most all of them."""
  total = 0
  for user in users.get(value.name, []):
    is_first = user.operands[0] == value.name
    if user.opcode in _SLICES and is_first:
      total += _size(user)
    elif user.opcode in _VIEWS:
      total += _read(user, users, whole)
    elif user.opcode in ("dynamic-update-slice", "scatter") and is_first:
      continue
    else:
      return whole
  return min(total, whole)


def _written(value: Instruction, inside: Computation) -> int:
  """Returns the bytes that a fusion writes for one of its results."""
  while value.opcode in _VIEWS:
    value = inside[value.operands[0]]
  if value.opcode == "dynamic-update-slice":
    return _size(inside[value.operands[1]])
  if value.opcode == "scatter":
    return 2 * _size(inside[value.operands[-1]])
  return 0 if value.opcode == "parameter" else _size(value)


def _size(instruction: Instruction) -> int:
  return sum(shape.bytes for shape in instruction.shapes)
