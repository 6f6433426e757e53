"""Compares layouts with one device, and writes down what it found.

jaxmoe parity [--full] [--cells=GLOB] [--again] [--out=FILE]

Runs on up to sixteen virtual CPU devices. Without --full only cells of every test run; --cells
takes a key or a glob of them, such as 'data+expert/*', or the key of a cell that the table has not,
such as the one that a recipe was refused for. A cell that is green for the sources as they are is
kept and not run again unless --again; the last line says how many were. It can be stopped at any
time: the same command goes on. The table is jaxmoe/parity/results.json of a clone, or --out.
"""

from __future__ import annotations

import fnmatch
import json
import os
import pathlib
import time

import jax
from absl import flags

from jaxmoe.commands.process import command_line, jax_settings
from jaxmoe.commands.process.compile_fast import compile_fast
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import check_output, write_atomic
from jaxmoe.parity import (
  REFUSED_PATH,
  Cell,
  Results,
  all_cells,
  refused,
  smoke_cells,
  source_digest,
)
from jaxmoe.parity.cell_run import commit_of_tree, run_cell
from jaxmoe.parity.cells import cell_called
from jaxmoe.parity.results import PATH

FLAGS = flags.FlagValues()
flags.DEFINE_bool("full", False, "All cells of the table.", flag_values=FLAGS)
flags.DEFINE_string("cells", "", "Cells whose key matches this glob.", flag_values=FLAGS)
flags.DEFINE_bool("again", False, "Also cells that are green already.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The table; that of the clone if not given.", flag_values=FLAGS)


def main(rest: list[str]) -> int:
  """Runs the command; returns 0 if all cells tried are green, else 1."""
  del rest
  path = pathlib.Path(FLAGS.out or table_of_clone())
  check_output(path, f"--out={path}")
  results, digest = Results.read(path), source_digest()
  cells = chosen()
  os.environ["JAX_PLATFORMS"] = "cpu"
  compile_fast()
  jax.config.update("jax_platforms", "cpu")
  devices = max(cell.parallel.num_devices for cell in cells)
  jax.config.update("jax_num_cpu_devices", devices)
  jax_settings.set_up_jax()
  commit = commit_of_tree()
  red = ran = 0
  for number, cell in enumerate(cells, start=1):
    row = results.rows.get(cell.key)
    done = row is not None and row.status == "green" and row.sources == digest
    if not done or FLAGS.again:
      started, ran = time.monotonic(), ran + 1
      row = run_cell(cell, commit, digest)
      # Another process may have written rows meanwhile.
      results = Results({**results.rows, **Results.read(path).rows}).also(row)
      results.write(path)
      took = f"{time.monotonic() - started:.0f} s"
      print(f"{number}/{len(cells)} {row.status} {took:>5}  {cell.key}  {row.note}", flush=True)
      jax.clear_caches()
    assert row is not None
    red += row.status != "green"
  if FLAGS.full and path.is_file():
    write_atomic(path.with_name(REFUSED_PATH.name), json.dumps(refused(), indent=1) + "\n")
  print(results.table(cell.key for cell in cells))
  print(f"{len(cells) - red} of {len(cells)} green: {len(cells) - ran} kept, {ran} run")
  return 1 if red else 0


def table_of_clone() -> pathlib.Path:
  """Returns the table that comes with the sources.

  Raises:
    InputError: they are installed, and belong to whoever installed them.
  """
  if not (PATH.parents[2] / "setup.cfg").is_file():
    raise InputError(
      f"--out is missing: {PATH} belongs to an installed package and is left as it is; give a "
      "file, such as --out=parity.json"
    )
  return PATH


def chosen() -> list[Cell]:
  """Returns the cells that the flags name.

  Raises:
    InputError: none has such a key.
  """
  if not FLAGS.cells:
    return all_cells() if FLAGS.full else smoke_cells()
  cells = [cell for cell in all_cells() if fnmatch.fnmatch(cell.key, FLAGS.cells)]
  if cells:
    return cells
  cell = cell_called(FLAGS.cells)
  if cell is None:
    raise InputError(
      f"--cells={FLAGS.cells}: no cell of the table is called so, nor is it the key of another; "
      f"one is {all_cells()[0].key!r}"
    )
  return [cell]


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__)


if __name__ == "__main__":
  run()
