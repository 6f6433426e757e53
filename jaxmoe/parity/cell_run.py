"""One cell as a row of the table: what it showed, and the commit that it ran at."""

from __future__ import annotations

import pathlib
import subprocess

from jaxmoe.parity.cell_errors import cell_errors, is_green
from jaxmoe.parity.cells import Cell
from jaxmoe.parity.results import Row


def run_cell(cell: Cell, commit: str, digest: str) -> Row:
  """Returns the row of one cell; an error of its own makes it red, too."""
  try:
    errors = cell_errors(cell)
  except Exception as error:  # what a cell raises is what it showed
    why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return Row(cell.key, "red", {}, commit, digest, why)
  wrong = [name for name, value in errors.items() if not is_green({name: value})]
  note = ", ".join(f"{name} {errors[name]:.1e}" for name in wrong)
  return Row(cell.key, "red" if wrong else "green", errors, commit, digest, note)


def commit_of_tree() -> str:
  """Returns the commit of the clone, with a `+` where files have changed since; `` outside one."""
  root = pathlib.Path(__file__).parents[2]

  def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()

  changed = git("status", "--porcelain", "--untracked-files=no", "--", "jaxmoe")
  changed = "\n".join(line for line in changed.splitlines() if not line.endswith(".json"))
  return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
