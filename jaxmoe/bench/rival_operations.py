"""Rivals in races of one operation: they get our arrays, and are timed once they find our values.

A rival is told the name of an operation of `jaxmoe/ops` and where the arrays are: an `.npz` with
the arguments by place (`0`, `1`, ...), the output's `cotangent`, and what has no gradient by name.
Files are float32; it computes in the type that it is told. It writes `out` and the gradients by
place, and then answers how long so many passes take.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxmoe.bench.benchmark import TOLERANCES, largest_error
from jaxmoe.bench.race import Run
from jaxmoe.bench.results import Row
from jaxmoe.bench.sides.process import Side
from jaxmoe.bench.suite import Asked, checked


@contextmanager
def rivals_of(
  asked: Asked,
  operation: str,
  constants: Mapping[str, Any],
  args: Sequence[jax.Array],
  right: Sequence[Any],
) -> Iterator[tuple[dict[str, Run], list[Row]]]:
  """Gives runs of the rivals that are right, by name, and rows of the others.

  Args:
    asked: Whose rivals.
    operation: Of `jaxmoe/ops`.
    constants: What it is told beside its arguments.
    args: Its arguments, and last the cotangent of its output.
    right: Its output and the gradients of its arguments.
  """
  given = {**{str(at): one for at, one in enumerate(args[:-1])}, "cotangent": args[-1]}
  dtype = args[0].dtype.name
  arrays = {name: np.asarray(one, np.float32) for name, one in given.items()}
  arrays |= {name: np.asarray(one) for name, one in constants.items()}
  with (
    tempfile.TemporaryDirectory() as name,
    asked.rival_sides({name: name for name in asked.rivals}) as (sides, rows),
  ):
    folder = pathlib.Path(name)
    np.savez(folder / "given.npz", **arrays)  # type: ignore[arg-type]
    runs: dict[str, Run] = {}
    for label, side in sides.items():
      found = checked(label, partial(_prepared, side, folder, operation, right, dtype))
      if found:
        rows.append(found)
      else:
        runs[label] = partial(side.seconds, "passes", number=1)
    yield runs, rows


def _prepared(
  side: Side, folder: pathlib.Path, operation: str, right: Sequence[Any], dtype: str
) -> str | None:
  """Hands a rival the arrays; returns how far it is off where that is too far."""
  side.ask("prepare", kind=operation, path=str(folder / "given.npz"), dtype=dtype)
  side.ask("values", path=str(folder / "values.npz"))
  values = np.load(folder / "values.npz")
  found = [values["out"], *(values[str(at)] for at in range(len(right) - 1))]
  error = largest_error(found, right)
  return None if error <= TOLERANCES[dtype] else f"error {error:.2g}"
