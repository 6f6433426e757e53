"""Collectives by mesh axes, FLOPs and memory of a compiled program (HLO).

All numbers are one device's, in one run of the program. XLA on CPU widens bfloat16 collectives to
float32; `hlo/stablehlo.py` reads the same of a program that is not compiled yet, in its own dtypes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmoe.hlo.dot_flops import dot_flops
from jaxmoe.hlo.replica_groups import ReplicaGroups, mesh_axes, permute_pairs, replica_groups
from jaxmoe.hlo.text import ArrayShape, parse_program
from jaxmoe.hlo.trip_counts import Visit, visits

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of a program, at one place of its code.

  Attributes:
    kind: One of KINDS.
    axes: The mesh axes it runs over, in the order of the mesh; empty where every group is one
      device; None where its groups are no product of axes.
    groups: The devices that exchange, by their places in the mesh.
    shape: The dims of the result; of the first part where it has several.
    dtype: Of the result as HLO writes it; several with a `+`.
    bytes_out: Of the result on one device.
    times: How often it runs; a loop of unknown length counts once.
    known: Whether all loops around it have a known length.
    sometimes: Whether it stands in a branch of a conditional; it counts as if it were taken.
    scope: The names of the code that made it.
    pairs: Of a permute, which device sends to which; empty of all others.
  """

  kind: str
  axes: tuple[str, ...] | None
  groups: ReplicaGroups
  shape: tuple[int, ...]
  dtype: str
  bytes_out: int
  times: int = 1
  known: bool = True
  sometimes: bool = False
  scope: str = ""
  pairs: ReplicaGroups = ()

  @property
  def group_size(self) -> int:
    """How many devices exchange; of the largest group where they differ."""
    return max(len(group) for group in self.groups)

  @property
  def wire_bytes(self) -> float:
    """What one device sends each time, as a ring or direct exchange does it."""
    n, out = self.group_size, self.bytes_out
    if n == 1:
      return 0.0
    if self.kind == "reduce-scatter":
      return float((n - 1) * out)
    if self.kind in ("collective-permute", "collective-broadcast"):
      return float(out)
    return (2 if self.kind == "all-reduce" else 1) * (n - 1) * out / n

  @property
  def total_wire_bytes(self) -> float:
    """What one device sends in all runs of the collective."""
    return self.times * self.wire_bytes

  @property
  def over(self) -> str:
    """The axes in words: `data,fsdp`; the first group's devices where it is no product of axes."""
    if self.axes is None:
      return "devices " + ",".join(map(str, self.groups[0]))
    return ",".join(self.axes) or "none"


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
  """Bytes of one device that a program needs.

  Attributes:
    arguments: What it is given.
    outputs: What it returns, `aliased` included.
    temporaries: What it needs in between.
    aliased: What it returns in the place of arguments that are donated.
    code: The program itself, where the compiler tells.
    peak: The most that is alive at a time: the sum of these (what is aliased once), or what the
      compiler says if that is more. XLA on CPU leaves temporaries out of its own number.
  """

  arguments: int
  outputs: int
  temporaries: int
  aliased: int
  code: int
  peak: int


@dataclasses.dataclass(frozen=True)
class Flops:
  """Floating point operations of one device.

  Attributes:
    matmul: Of matrix products, 2 for each multiply-add, loops counted as often as they run.
    unknown_loops: Of matrix products in loops of unknown length, for one pass of each.
    compiler: XLA's own count of all operations, which counts the body of a loop once on CPU; None
      where it has none.
  """

  matmul: int
  unknown_loops: int
  compiler: float | None


def collectives(compiled: jax.stages.Compiled, mesh: Mesh) -> list[Collective]:
  """Returns every collective of a compiled program, in the order of its text."""
  return collectives_of_text(compiled.as_text() or "", mesh)


def collectives_of_text(text: str, mesh: Mesh) -> list[Collective]:
  """Returns every collective of the text of a compiled program over this mesh."""
  return [
    _collective(visit, kind, mesh)
    for visit in visits(parse_program(text))
    if (kind := visit.instruction.opcode.removesuffix("-start")) in KINDS
  ]


def memory(compiled: jax.stages.Compiled) -> CompiledMemory:
  """Returns what the compiler says of memory; exact for arguments and outputs."""
  found: Any = compiled.memory_analysis()
  sizes = {
    name: int(getattr(found, f"{name}_size_in_bytes"))
    for name in ("argument", "output", "temp", "alias", "generated_code")
  }
  sum_of_parts = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
  return CompiledMemory(
    arguments=sizes["argument"],
    outputs=sizes["output"],
    temporaries=sizes["temp"],
    aliased=sizes["alias"],
    code=sizes["generated_code"],
    peak=max(int(getattr(found, "peak_memory_in_bytes", 0)), sum_of_parts),
  )


def flops(compiled: jax.stages.Compiled) -> Flops:
  """Returns the operations of a compiled program's matrix products, loops included."""
  matmul = unknown = 0
  for visit in visits(parse_program(compiled.as_text() or "")):
    count = visit.times * dot_flops(visit.instruction, visit.computation)
    matmul, unknown = (matmul + count, unknown) if visit.known else (matmul, unknown + count)
  counted: Any = compiled.cost_analysis()
  counted = counted[0] if isinstance(counted, list) and counted else counted
  return Flops(matmul, unknown, float(counted["flops"]) if counted and "flops" in counted else None)


def _collective(visit: Visit, kind: str, mesh: Mesh) -> Collective:
  instruction = visit.instruction
  shapes = _results(visit)
  groups = replica_groups(instruction, mesh.devices.size)
  return Collective(
    kind=kind,
    axes=mesh_axes(groups, mesh),
    groups=groups,
    shape=shapes[0].dims,
    dtype="+".join(dict.fromkeys(shape.dtype for shape in shapes)),
    bytes_out=sum(shape.bytes for shape in shapes),
    times=visit.times,
    known=visit.known,
    sometimes=visit.sometimes,
    scope=instruction.scope,
    pairs=permute_pairs(instruction),
  )


def _results(visit: Visit) -> tuple[ArrayShape, ...]:
  """Returns the arrays a collective makes; of an asynchronous one, what its end has."""
  instruction = visit.instruction
  if not instruction.opcode.endswith("-start"):
    return instruction.shapes
  end = instruction.opcode.removesuffix("start") + "done"
  ends = [
    other.shapes
    for other in visit.computation.values()
    if other.opcode == end and instruction.name in other.operands
  ]
  return ends[0] if ends else instruction.shapes[-1:]
