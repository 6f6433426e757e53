"""The text of a compiled program (HLO) as computations of instructions."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

Computation = Mapping[str, "Instruction"]

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")


@dataclasses.dataclass(frozen=True)
class ArrayShape:
  """One array of a program; `dtype` as HLO writes it, such as bf16 or s8."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """What the array takes, without the padding of its layout."""
    return math.prod(self.dims) * bits_of(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation: `%name = shapes opcode(inner), attributes`."""

  name: str
  shapes: tuple[ArrayShape, ...]
  opcode: str
  inner: str
  attributes: str
  is_root: bool = False

  @property
  def operands(self) -> tuple[str, ...]:
    """The names of the instructions it reads."""
    return tuple(re.findall(r"%([\w.\-]+)", self.inner))

  @property
  def scope(self) -> str:
    """The names of the code that made it."""
    return self.attribute(r'op_name="([^"]*)"') or ""

  def attribute(self, pattern: str) -> str | None:
    """Returns the first group of a pattern where the attributes have it."""
    found = re.search(pattern, self.attributes)
    return found.group(1) if found else None

  def called(self, how: str) -> list[str]:
    """Returns the computations it calls by an attribute such as `body` or `calls`."""
    names = self.attribute(rf"\b{how}=(\{{[^}}]*\}}|%?[\w.\-]+)") or ""
    return re.findall(r"[\w.\-]+", names)


@dataclasses.dataclass(frozen=True)
class HloProgram:
  """The computations of a compiled program, by name, each a dict of instructions by name."""

  computations: Mapping[str, Computation]
  entry: str

  def root(self, name: str) -> Instruction:
    """Returns the instruction whose value a computation returns."""
    return next(found for found in self.computations[name].values() if found.is_root)


def parse_program(text: str) -> HloProgram:
  """Returns the program whose `as_text()` this is."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if not line.startswith(" "):
      header = None if line.startswith("HloModule") else _HEADER.match(line)
      if header:
        current = computations.setdefault(header.group(2), {})
        entry = header.group(2) if header.group(1) else entry
    elif current is not None and (found := _LINE.match(line)):
      rest = line[found.end() :]
      current[found.group(2)] = _instruction(found.group(2), rest, found.group(1) is not None)
  assert entry, "not the text of a compiled program"
  return HloProgram(computations, entry)


def bits_of(dtype: str) -> int:
  """Returns the bits of an element of a dtype as HLO or StableHLO writes it; 0 for a token."""
  if dtype in ("pred", "i1"):
    return 8
  found = re.match(r"(?:bf|f|s|ui|u|i|c)(\d+)", dtype)
  return int(found.group(1)) if found else 0


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
  """Returns the instruction of `SHAPES opcode(inner), attributes`."""
  text = re.sub(r"/\*.*?\*/", "", text)
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  kind, rest = text[:end], text[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  shapes = tuple(
    ArrayShape(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size))
    for dtype, dims in _ARRAY.findall(kind)
  )
  inner, attributes = rest[opening + 1 : closing], rest[closing + 1 :]
  return Instruction(name, shapes, rest[:opening], inner, attributes, is_root)


def _closing(text: str, opening: int) -> int:
  """Returns where the parenthesis that opens there is closed."""
  depth = 0
  for at in range(opening, len(text)):
    depth += (text[at] == "(") - (text[at] == ")")
    if not depth:
      return at
  raise AssertionError(f"no closing parenthesis: {text[:200]}")
