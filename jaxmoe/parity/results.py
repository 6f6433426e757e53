"""results.json: what has been shown, at which commit, and whether a recipe may stand on it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable

from jaxmoe.core.errors import InputError
from jaxmoe.core.output import write_atomic
from jaxmoe.parity.cells import cells_of
from jaxmoe.train.experiment import Experiment

PATH = pathlib.Path(__file__).with_name("results.json")
REFUSED_PATH = PATH.with_name("refused.json")
_ROOT = pathlib.Path(__file__).parents[1]
_SOURCES = (
  "core/backends.py",
  "core/decimals.py",
  "core/deferred_products.py",
  "core/first_values.py",
  "core/init.py",
  "core/layout.py",
  "core/metrics.py",
  "core/param_names.py",
  "core/parallel_context.py",
  "core/rng.py",
  "core/tokens.py",
  "core/weight_formats.py",
  "models/*.py",
  "moe",
  "ops",
  "optim",
  "parallel/attend/*.py",
  "parallel/block_order.py",
  "parallel/called_programs.py",
  "parallel/context_rows.py",
  "parallel/scan_prefetch.py",
  "parallel/degrees.py",
  "parallel/layouts.py",
  "parallel/mesh_context.py",
  "parallel/origins.py",
  "parallel/pipelines/*.py",
  "parallel/stages.py",
  "parallel/tick_scan.py",
  "parallel/zero.py",
  "parity/*.py",
  "train/deferred_weights.py",
  "train/gradients.py",
  "train/kept_residuals.py",
  "train/pipeline_gradients.py",
  "train/pipeline_stages.py",
  "train/pipeline_state.py",
  "train/pipeline_step.py",
  "train/sharded_gradients.py",
  "train/spread_head.py",
  "train/stage_program.py",
)
"""What the numbers of a cell depend on, under `jaxmoe/`."""


@dataclasses.dataclass(frozen=True)
class Row:
  """What one cell showed.

  Attributes:
    cell: Its key.
    status: `green` or `red`.
    errors: The largest relative error of each quantity.
    commit: Of the tree that it ran in, with `+` where files had changed since.
    sources: The digest of what its numbers depend on, see `source_digest`.
    note: Why it is red, where it ended in an error.
  """

  cell: str
  status: str
  errors: dict[str, float]
  commit: str
  sources: str
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Results:
  """The rows of a table, by key."""

  rows: dict[str, Row]

  @classmethod
  def read(cls, path: pathlib.Path = PATH) -> Results:
    """Returns the rows of a file; none where there is no file.

    Raises:
      InputError: the file is not a table.
    """
    if not path.is_file():  # a device has nothing to say
      return cls({})
    try:
      rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
      raise InputError(
        f"{path} is no table of cells: {error}; remove it and run jaxmoe parity"
      ) from None
    return cls({row.cell: row for row in rows})

  def write(self, path: pathlib.Path = PATH) -> None:
    """Writes the rows in order of their keys, all or nothing."""
    rows = [dataclasses.asdict(self.rows[key]) for key in sorted(self.rows)]
    lines = ",\n".join(json.dumps(row, sort_keys=True) for row in rows)
    write_atomic(path, f"[\n{lines}\n]\n")

  def also(self, row: Row) -> Results:
    """Returns the table with one more row, or another of its cell."""
    return Results({**self.rows, row.cell: row})

  def not_green(self, keys: Iterable[str]) -> list[str]:
    """Returns the keys that are not green."""
    return [key for key in keys if key not in self.rows or self.rows[key].status != "green"]

  def table(self, keys: Iterable[str]) -> str:
    """Returns the rows of these cells that there are, as text of at most 100 columns."""
    rows = [self.rows[key] for key in sorted(keys) if key in self.rows]
    lines = [f"{'loss':>8} {'grads':>8} {'step':>8} {'balance':>8}  cell"]
    for row in rows:
      step = max(row.errors.get("params", 0.0), row.errors.get("moments", 0.0))
      shown = (row.errors.get(name) for name in ("loss", "grads"))
      numbers = [*shown, step, row.errors.get("balance_grads")]
      text = " ".join(f"{'-':>8}" if x is None else f"{x:8.1e}" for x in numbers)
      lines.append(f"{text}  {row.cell}" + ("" if row.status == "green" else f"  RED {row.note}"))
    return "\n".join(lines)


def source_digest() -> str:
  """Returns a digest of the sources that numbers of cells depend on; the same on every machine."""
  paths: list[pathlib.Path] = []
  for pattern in _SOURCES:
    path = _ROOT / pattern
    found = list(path.rglob("*.py") if path.is_dir() else _ROOT.glob(pattern))
    assert found, f"no source matches {pattern!r}: it moved, and tables would not age with it"
    paths.extend(found)
  total = hashlib.sha256()
  for path in sorted(paths):
    total.update(path.relative_to(_ROOT).as_posix().encode())
    total.update(path.read_bytes())
  return total.hexdigest()[:16]


def check_proven(experiment: Experiment, results: Results | None = None) -> list[str]:
  """Returns warnings about a recipe's layout; none on one device.

  Raises:
    InputError: a cell that the recipe stands on is not green.
  """
  keys = cells_of(experiment)
  if not keys:
    return []
  results = Results.read() if results is None else results
  missing = results.not_green(keys)
  if missing:
    state = "red" if missing[0] in results.rows else "not tried"
    raise InputError(
      f"this layout has not been shown equal to one device: {missing[0]} is {state}"
      + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
      + f"; try it with jaxmoe parity --cells='{missing[0]}', or set --allow_unproven"
    )
  digest = source_digest()
  old = sum(results.rows[key].sources != digest for key in keys)
  if not old:
    return []
  return [
    f"sources have changed since {old} of {len(keys)} cells of this layout were shown equal to "
    "one device; jaxmoe parity tries them again"
  ]

