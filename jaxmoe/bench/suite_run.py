"""A suite from its flags to its file: what is asked is checked before anything compiles."""

from __future__ import annotations

import hashlib
import importlib
import pathlib
from typing import Any

import jax
from rich.console import Console

import jaxmoe
from jaxmoe.bench.results import RowFile
from jaxmoe.bench.rows_text import rows_text
from jaxmoe.bench.suite import Asked
from jaxmoe.core.errors import InputError
from jaxmoe.cost import host


def chosen(flag: str, asked: str | None, known: tuple[str, ...], default: int) -> tuple[str, ...]:
  """Returns the names of a list, the first few of those known where none is given.

  Raises:
    InputError: one is not known.
  """
  if asked is None:
    return known[:default]
  names = tuple(name for name in asked.split(",") if name)
  for name in names:
    if name not in known:
      there = f"there are: {', '.join(known)}" if known else "this suite has none"
      raise InputError(f"--{flag}={asked}: {name} is not known here; {there}")
  return names


def run_suite(name: str, asked: Asked, path: str | None, console: Console) -> bool:
  """Runs a suite, prints each race and keeps its file; returns whether nothing was wrong."""
  results = RowFile(path, _about(name, asked), asked.say, lambda: _noted(asked))
  shown: set[str] = set()

  def show(race: str) -> None:
    rows = [row for row in results.rows if row["race"] == race]
    console.print(rows_text(f"{name}: {race}", rows))
    shown.add(race)

  results.on_race = show
  importlib.import_module(f"jaxmoe.bench.suites.{name}").run(asked, results)
  for race in dict.fromkeys(row["race"] for row in results.rows):
    if race not in shown:
      show(race)
  results.finish()
  return not any("wrong" in row or "failed" in row for row in results.rows)


def _about(name: str, asked: Asked) -> dict[str, Any]:
  """Returns what rows depend on beside luck: an unfinished file of something else is made anew."""
  return {
    "suite": name,
    "shapes": list(asked.shapes),
    "rivals": list(asked.rivals),
    "count": asked.count,
    "rounds": asked.rounds,
    "dtype": asked.dtype,
    "device": jax.devices()[0].device_kind,
    "processor": host.processor(),
    "cores": host.cores(),
    "jax": jax.__version__,
    "code": _digest_of_code(),
  }


def _noted(asked: Asked) -> dict[str, Any]:
  """Returns what is told of a machine and of rivals, which may be found out on the way."""
  if asked.count:
    return {"versions": asked.versions}
  flops, moved = asked.peaks()
  return {"versions": asked.versions, "peak_flops_per_s": flops, "peak_bytes_per_s": moved}


def _digest_of_code() -> str:
  """Returns a digest of the sources of this package."""
  root = pathlib.Path(jaxmoe.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]
