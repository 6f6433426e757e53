"""Every back end of every operation of `jaxmoe/ops`, forward and backward, at sizes of models.

Values and all gradients are those of the operation's reference before anything is timed; so are
those of rivals, which have some of the operations. What is raced on a device that is no CPU is what
`auto` goes by there from then on, see `core/measured.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.bench.benchmark import TOLERANCES, largest_error
from jaxmoe.bench.kernel_cases import CASES, SIZES, Case, both_ways, fitting, operations
from jaxmoe.bench.program_counts import counted_row
from jaxmoe.bench.race import Run, race, timed
from jaxmoe.bench.results import Row, RowFile
from jaxmoe.bench.rival_operations import rivals_of
from jaxmoe.bench.suite import Asked
from jaxmoe.core.backends import Devices
from jaxmoe.core.measured import MeasuredRow, source_digest


def run(asked: Asked, results: RowFile) -> None:
  """Races or counts the back ends of each operation at each size."""
  for shape in asked.shapes:
    for name, backends in operations().items():
      race = f"{name}, {shape}, {asked.dtype}"
      if results.has(race):
        continue
      asked.say(f"{race} ...")
      case = CASES[name](SIZES[shape]).cast(asked.dtype)
      constants = case.constants
      others = _nobody if constants is None else partial(rivals_of, asked, name, constants)
      rows = rows_of(case, backends, None if asked.count else asked.rounds, others)
      results.add(race, rows)
      if asked.keep is not None and not asked.count:
        asked.keep(measured_rows(name, case, backends, rows))


def measured_rows(operation: str, case: Case, backends: Any, rows: list[Row]) -> list[MeasuredRow]:
  """Returns what a race on the devices of this process says of its back ends."""
  ended = {row["name"]: row for row in rows if row["name"] in backends and "unfit" not in row}
  right = [name for name, row in ended.items() if "wall_ratio" in row]
  first = ended[right[0]]["seconds"] if right else 1.0
  return [
    MeasuredRow(
      operation, name, Devices.here().kind, jax.__version__, case.args[0].dtype.name,
      dict(case.sizes), name in right, row["seconds"] / first if name in right else 0.0,
      source_digest(getattr(backends[name], "call", backends[name])),
    )
    for name, row in ended.items()
  ]  # fmt: skip


Others = Callable[[Any, Any], AbstractContextManager[tuple[dict[str, Run], list[Row]]]]
"""What gives, of the arrays and of what is right, the runs and rows of rivals."""


def _nobody(args: Any, right: Any) -> AbstractContextManager[tuple[dict[str, Run], list[Row]]]:
  del args, right
  return nullcontext(({}, []))


def rows_of(case: Case, backends: Any, rounds: int | None, others: Others = _nobody) -> list[Row]:
  """Returns a row for each back end: counted where there are no rounds, else raced with others."""
  dtype = case.args[0].dtype.name
  reasons = {name: fitting(backend, case.sizes, dtype) for name, backend in backends.items()}
  rows: list[Row] = [{"name": name, "unfit": why} for name, why in reasons.items() if why]
  out = jax.eval_shape(case.call(backends[case.base]), *case.args)
  cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
  given = (*case.args, cotangent.astype(out.dtype))
  functions = {}
  for name in (name for name, why in reasons.items() if not why):
    try:
      functions[name] = jax.jit(both_ways(case.call(backends[name]))).lower(*given).compile()
    except jax.errors.JaxRuntimeError as failure:  # such as for want of memory
      rows.append(_failed(name, failure))
  counted = {name: counted_row(name, made, case.work) for name, made in functions.items()}
  if rounds is None or case.base not in functions:
    return [*counted.values(), *rows]
  runs: dict[str, Run] = {}
  right: list[Any] = []
  for name in sorted(functions, key=lambda name: name != case.base):  # the oracle first
    try:
      values = jax.tree.leaves(functions[name](*given))
      right = right or [np.asarray(one) for one in values]
      error = largest_error(values, right)
    except jax.errors.JaxRuntimeError as failure:
      rows.append(_failed(name, failure))
      if name == case.base:
        return [*counted.values(), *rows]
      continue
    if error <= TOLERANCES[dtype]:
      runs[name] = partial(timed, partial(functions[name], *given))
    else:
      rows.append({"name": name, "wrong": f"error {error:.2g}"})
  with others(given, right) as (rivals, found):
    raced = race({**runs, **rivals}, case.base, rounds)
  return [{**counted.get(row["name"], {}), **row} for row in raced] + rows + found


def _failed(name: str, error: Exception) -> Row:
  return {"name": name, "failed": str(error).partition("\n")[0][:300]}
