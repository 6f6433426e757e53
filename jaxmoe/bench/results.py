"""The file of a suite: whole rows at any time, so that a suite that was killed goes on.

A race's rows come together or not at all. The same command in the same place finds those of an
unfinished file and makes the rest; a finished file is made anew.
"""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Callable
from typing import Any

from jaxmoe.core.output import check_output, write_output

Row = dict[str, Any]


class RowFile:
  """Rows of a suite, written after each race.

  Attributes:
    rows: All rows so far.
    on_race: Called with the name of a race whose rows were added.
  """

  def __init__(
    self, path: str | None, about: dict[str, Any], say: Callable[[str], None],
    noted: Callable[[], dict[str, Any]] = dict,
  ):  # fmt: skip
    """Reads what is there.

    Args:
      path: The file; None for none.
      about: What rows depend on; rows of anything else are not gone on with.
      say: Told that rows are gone on with.
      noted: Returns what stands beside, whatever it is.
    """
    self._path, self._about, self._noted = path, about, noted
    self.rows: list[Row] = []
    self.on_race: Callable[[str], None] = lambda race: None
    if path is None:
      return
    check_output(path, f"--json={path}")
    found = _read(path)
    if found.get("about") == about and not found.get("finished", True):
      self.rows = found["rows"]
      say(f"going on with {len(self.rows)} rows of {path}")

  def has(self, race: str) -> bool:
    """Whether the rows of a race are there."""
    return any(row["race"] == race for row in self.rows)

  def add(self, race: str, rows: list[Row]) -> None:
    """Keeps the rows of a race, and writes the file."""
    self.rows += [{"race": race, **row} for row in rows]
    self._write(finished=False)
    self.on_race(race)

  def finish(self) -> None:
    """Writes that no row is missing."""
    self._write(finished=True)

  def _write(self, finished: bool) -> None:
    if self._path is None:
      return
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"about": self._about, **self._noted(), "date": when, "finished": finished}
    record["rows"] = self.rows
    write_output(self._path, f"--json={self._path}", json.dumps(record, indent=1) + "\n")


def _read(path: str) -> dict[str, Any]:
  """Returns what a file has; nothing where it is no file of ours."""
  try:
    found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    whole = isinstance(found["rows"], list) and all("race" in row for row in found["rows"])
  except (OSError, ValueError, TypeError, KeyError):
    return {}
  return found if whole else {}
