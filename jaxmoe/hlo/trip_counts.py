"""Trip counts of loops in HLO: how often each instruction of a compiled program runs.

The text has a computation once, wherever it is called, and the body of a loop once. The number of
its passes is what XLA prints (CPU, GPU), or what the loop itself says (TPU): a counter that starts
at a constant, grows by one and stays below another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from jaxmoe.hlo.text import Computation, HloProgram, Instruction

_CALLS = ("body", "calls", "to_apply", "called_computations")
_CONTROL = ("body",)
_BRANCHES = ("branch_computations", "true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class Visit:
  """An instruction where it runs.

  Attributes:
    instruction: What runs.
    computation: The instructions beside it, by name.
    times: How often it runs in one run of the program; a loop of unknown length counts once.
    known: Whether it stands in no loop of unknown length.
    sometimes: Whether it stands in a branch of a conditional; it counts as if it were taken.
  """

  instruction: Instruction
  computation: Computation
  times: int = 1
  known: bool = True
  sometimes: bool = False


def visits(program: HloProgram, into_fusions: bool = True) -> Iterator[Visit]:
  """Yields every instruction, once for each place that its computation is called from.

  Args:
    program: What runs.
    into_fusions: Whether what is inside of fusions, and of what reduces or sorts, is visited too.
  """
  calls = _CALLS if into_fusions else _CONTROL
  return _visits(program, program.entry, Visit(Instruction("", (), "", "", ""), {}), calls)


def trip_count(program: HloProgram, name: str, loop: Instruction) -> int | None:
  """Returns how often the body of a `while` of a computation runs; None if that is not known."""
  known_trips = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
  if known_trips:
    return int(known_trips)
  (condition,), (body,) = loop.called("condition"), loop.called("body")
  test = _Scalars(program, condition).of_root()
  if not isinstance(test, _Below):
    return None
  start_tuple = program.computations[name][loop.operands[0]]
  end_tuple = program.root(body)
  if start_tuple.opcode != "tuple" or end_tuple.opcode != "tuple":
    return None
  end = _Scalars(program, body).of(end_tuple.operands[test.index])
  start = _Scalars(program, name).of(start_tuple.operands[test.index])
  if end != _Carried(test.index, 1) or not isinstance(start, int):
    return None
  return max(test.limit - start, 0)


def _visits(
  program: HloProgram, name: str, around: Visit, calls: tuple[str, ...]
) -> Iterator[Visit]:
  computation = program.computations[name]
  for instruction in computation.values():
    here = dataclasses.replace(around, instruction=instruction, computation=computation)
    yield here
    if instruction.opcode in ("async-update", "async-done"):
      continue  # they name what async-start has called
    inside = here
    if instruction.opcode == "while":
      passes = trip_count(program, name, instruction)
      times = here.times * (1 if passes is None else passes)
      inside = dataclasses.replace(here, times=times, known=here.known and passes is not None)
    is_call = instruction.opcode in ("call", "async-start")
    for how in _CALLS if is_call else calls:
      for callee in instruction.called(how):
        yield from _visits(program, callee, inside, calls)
    for how in _BRANCHES:
      for callee in instruction.called(how):
        yield from _visits(program, callee, dataclasses.replace(here, sometimes=True), calls)


@dataclasses.dataclass(frozen=True)
class _Carried:
  """An element of a loop's tuple, plus a constant."""

  index: int
  plus: int = 0


@dataclasses.dataclass(frozen=True)
class _Below:
  """Whether an element of a loop's tuple is below a constant."""

  index: int
  limit: int


_Value = int | _Carried | _Below | None


class _Scalars:
  """What the integers of a computation are, as far as it can be read from a loop's counter."""

  def __init__(self, program: HloProgram, name: str, given: Sequence[_Value] | None = None):
    self._program, self._given = program, given
    self._name, self._computation = name, program.computations[name]

  def of_root(self) -> _Value:
    """Returns what the computation returns."""
    return self.of(self._program.root(self._name).name)

  def of(self, name: str) -> _Value:
    """Returns the value of an instruction; None if it is anything else."""
    found = self._computation[name]
    if found.opcode == "constant":
      return int(found.inner) if found.inner.lstrip("-").isdigit() else None
    if found.opcode == "get-tuple-element":
      whole = self._computation[found.operands[0]]
      index = found.attribute(r"index=(\d+)")
      return _Carried(int(index)) if whole.opcode == "parameter" and index else None
    if found.opcode == "parameter":
      return self._given[int(found.inner)] if self._given is not None else None
    values = [self.of(operand) for operand in found.operands]
    if found.opcode in ("fusion", "call"):
      (callee,) = found.called("calls") or found.called("to_apply")
      return _Scalars(self._program, callee, values).of_root()
    return _combined(found, values)


def _combined(found: Instruction, values: Sequence[_Value]) -> _Value:
  """Returns the value of an instruction of one or two operands."""
  if found.opcode in ("copy", "bitcast"):
    return values[0]
  if found.opcode == "compare" and "direction=LT" in found.attributes:
    counter, limit = values
    if isinstance(counter, _Carried) and not counter.plus and isinstance(limit, int):
      return _Below(counter.index, limit)
  if found.opcode == "add":
    counters = [value for value in values if isinstance(value, _Carried)]
    steps = [value for value in values if isinstance(value, int)]
    if len(counters) == len(steps) == 1:
      return _Carried(counters[0].index, counters[0].plus + steps[0])
  return None
