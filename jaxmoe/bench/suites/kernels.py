"""Every back end of every operation of `jaxmoe/ops`, forward and backward, at one size each.

Values and all gradients are those of the operation's reference before anything is timed; so are
those of rivals, which have some of the operations.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.bench.benchmark import TOLERANCES, largest_error
from jaxmoe.bench.kernel_cases import CASES, Case, both_ways, fitting, operations
from jaxmoe.bench.program_counts import counted_row
from jaxmoe.bench.race import Run, race, timed
from jaxmoe.bench.results import Row, RowFile
from jaxmoe.bench.rival_operations import rivals_of
from jaxmoe.bench.suite import Asked


def run(asked: Asked, results: RowFile) -> None:
  """Races or counts the back ends of each operation."""
  for name, backends in operations().items():
    if results.has(name):
      continue
    asked.say(f"{name} ...")
    case = CASES[name]()
    others = _nobody if case.constants is None else partial(rivals_of, asked, name, case.constants)
    results.add(name, rows_of(case, backends, None if asked.count else asked.rounds, others))


Others = Callable[[Any, Any], AbstractContextManager[tuple[dict[str, Run], list[Row]]]]
"""What gives, of the arrays and of what is right, the runs and rows of rivals."""


def _nobody(args: Any, right: Any) -> AbstractContextManager[tuple[dict[str, Run], list[Row]]]:
  del args, right
  return nullcontext(({}, []))


def rows_of(case: Case, backends: Any, rounds: int | None, others: Others = _nobody) -> list[Row]:
  """Returns a row for each back end: counted where there are no rounds, else raced with others."""
  reasons = {name: fitting(backend, case.sizes) for name, backend in backends.items()}
  rows: list[Row] = [{"name": name, "unfit": why} for name, why in reasons.items() if why]
  out = jax.eval_shape(case.call(backends[case.base]), *case.args)
  cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
  given = (*case.args, cotangent)
  functions = {
    name: jax.jit(both_ways(case.call(backends[name]))).lower(*given).compile()
    for name, why in reasons.items() if not why
  }  # fmt: skip
  counted = {name: counted_row(name, made, case.work) for name, made in functions.items()}
  if rounds is None:
    return [*counted.values(), *rows]
  right = jax.tree.leaves(functions[case.base](*given))
  runs: dict[str, Run] = {}
  for name, function in functions.items():
    error = largest_error(jax.tree.leaves(function(*given)), right)
    if error <= TOLERANCES["float32"]:
      runs[name] = partial(timed, partial(function, *given))
    else:
      rows.append({"name": name, "wrong": f"error {error:.2g}"})
  with others(given, right) as (rivals, found):
    raced = race({**runs, **rivals}, case.base, rounds)
  return [{**counted.get(row["name"], {}), **row} for row in raced] + rows + found
