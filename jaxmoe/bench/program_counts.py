"""The work of a compiled program beside the least it has to do: a row that times nothing."""

from __future__ import annotations

from typing import Any

import jax

from jaxmoe.bench.ideal_work import Work, decode_work
from jaxmoe.hlo.compiled import flops, memory
from jaxmoe.hlo.traffic import movements, program_size
from jaxmoe.models.token_writer import lower_draw
from jaxmoe.train.experiment import Experiment


def counted_row(name: str, compiled: jax.stages.Compiled, ideal: Work) -> dict[str, Any]:
  """Returns FLOPs of products, bytes moved, temporaries and fusions of a program.

  Loops count as often as they run; those that end when they like count one pass, which `flops` and
  `bytes` have in them and `unknown_flops` and `unknown_bytes` tell apart.
  """
  products, size = flops(compiled), program_size(compiled)
  moved = movements(compiled)
  unknown = sum(one.total for one in moved if not one.known)
  return {
    "name": name,
    "flops": products.matmul + products.unknown_loops,
    "ideal_flops": ideal.flops,
    "bytes": sum(one.total for one in moved),
    "ideal_bytes": ideal.bytes,
    "temp_bytes": memory(compiled).temporaries,
    "fusions": size.fusions,
    "instructions": size.instructions,
    "unknown_flops": products.unknown_loops,
    "unknown_bytes": unknown,
    "moves": _largest(moved),
  }


def counted_draw(name: str, experiment: Experiment, rows: int, new: int, slots: int) -> Any:
  """Returns the row of the program that reads `new` tokens of each row and draws the next.

  Of one token it is a pass of the loop that writes on: `one_pass`.
  """
  compiled = lower_draw(experiment.decoder(), rows, new, slots).compile()
  row = counted_row(name, compiled, decode_work(experiment, rows, new, slots))
  return {**row, "one_pass": new == 1}


def _largest(moved: list[Any], number: int = 8) -> list[dict[str, Any]]:
  """Returns what moves most, places of one code and size together."""
  sums: dict[tuple[str, str, int], list[int]] = {}
  for one in moved:
    total = sums.setdefault((one.opcode, one.scope[-100:], one.bytes), [0, 0])
    total[0] += one.total
    total[1] += one.times
  ordered = sorted(sums.items(), key=lambda item: -item[1][0])[:number]
  return [
    {"what": opcode, "code": scope, "bytes": total, "times": times}
    for (opcode, scope, _), (total, times) in ordered
  ]
