"""Files of suites, read back; a file that is none is refused before a page is written."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxmoe.bench.results import Row
from jaxmoe.core.errors import InputError

NOTED = ("versions", "peak_flops_per_s", "peak_bytes_per_s")


@dataclasses.dataclass(frozen=True)
class ResultFile:
  """What a suite wrote.

  Attributes:
    path: Where.
    about: The suite, machine, versions, settings and peaks.
    date: When it was last written.
    finished: Whether no row is missing.
    rows: Its rows, in order.
  """

  path: str
  about: dict[str, Any]
  date: str
  finished: bool
  rows: list[Row]

  @property
  def suite(self) -> str:
    """The name of the suite."""
    return str(self.about["suite"])

  def races(self) -> dict[str, list[Row]]:
    """Returns the rows of each race, in order."""
    found: dict[str, list[Row]] = {}
    for row in self.rows:
      found.setdefault(row["race"], []).append(row)
    return found


def read_files(paths: Sequence[str]) -> list[ResultFile]:
  """Returns the files, in the order in which they are given.

  Raises:
    InputError: there is none, or one is not of a suite.
  """
  if not paths:
    raise InputError("page: no file of a suite is named; give those that --json wrote")
  return [_read(path) for path in paths]


def _read(path: str) -> ResultFile:
  try:
    plain = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    assert isinstance(plain["about"]["suite"], str) and isinstance(plain["rows"], list)
    assert all({"race", "name"} <= row.keys() for row in plain["rows"])
    about = {**plain["about"], **{key: plain[key] for key in NOTED if key in plain}}
    return ResultFile(path, about, plain["date"], plain["finished"], plain["rows"])
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror}); give files of suites") from None
  except (ValueError, TypeError, KeyError, AssertionError, AttributeError):
    raise InputError(f"{path}: is not what a suite writes with --json; leave it out") from None
