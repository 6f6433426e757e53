"""Checks of a folder that is to be a workdir: a run's, nobody's yet, or somebody else's.

Into somebody else's nothing is written: a metrics.jsonl, report.html or tokenizer.json there is not
ours to write over. What schedulers, shells and file systems leave in a folder before a run begins
makes it nobody else's: hidden files, `lost+found`, logs, a profile, and folders with nothing in
them, such as one that a link gives to `checkpoints`.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.train.run_log import read_lines

BEFOREHAND = re.compile(r"\..*|lost\+found|lock|profile|logs?|(stdout|stderr).*|.*\.(log|out|err)")
"""Names of what may lie in a folder before a run begins there."""

_MARKS = ("label/metadata", "manifest.json")  # of a step, as stores, which bring JAX along, have it
_FIELDS = {"data", "model", "optim", "train"}
_SHOWN = 3


def check_folder(path: pathlib.Path, named: str) -> None:
  """Returns if a folder holds a run, may hold one, or is not there yet.

  Args:
    path: The folder.
    named: The flag that named it, for errors.

  Raises:
    InputError: it holds something else, lies among the checkpoints of a run, or cannot be read.
  """
  for above in path.absolute().parents:
    if above.name == "checkpoints" and holds_run(above.parent):
      raise InputError(
        f"{named}: lies among the checkpoints of the run in {above.parent}; choose another"
      )
  if not os.path.isdir(path) or os.path.exists(path / "config.json") or holds_run(path):
    return  # whose config.json it is shows when it is read
  try:
    found = list(itertools.islice(_strangers(path), _SHOWN + 1))
  except OSError as error:
    raise InputError(
      f"{named}: cannot be read ({error.strerror}); choose another folder"
    ) from None
  if found:
    names = ", ".join(sorted(found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
    raise InputError(
      f"{named}: is neither empty nor a run (it holds {names}); give it a folder of "
      "its own"
    )


def holds_run(path: pathlib.Path) -> bool:
  """Whether the files in a folder are those of a run, also where some of them are lost."""
  for event in read_lines(path / "events.jsonl"):
    if "event" in event and "unix_s" in _object(event.get("time")):
      return True
  for line in read_lines(path / "metrics.jsonl"):
    return "step" in line and "seconds" in _object(line.get("time"))
  try:
    if any(next((path / "checkpoints").glob(f"[0-9]*/{mark}"), None) for mark in _MARKS):
      return True
    return set(json.loads((path / "config.json").read_bytes())) >= _FIELDS
  except (OSError, ValueError, TypeError):
    return False


def _object(value: Any) -> dict[str, Any]:
  return value if isinstance(value, dict) else {}


def _strangers(path: pathlib.Path) -> Iterator[str]:
  """Yields the names of what is neither a run's nor there before one begins."""
  with os.scandir(path) as entries:
    for entry in entries:
      if BEFOREHAND.fullmatch(entry.name) or (entry.is_dir() and not _any_in(entry.path)):
        continue
      if entry.name != "checkpoints" or os.path.exists(entry.path):  # a dead link is told by others
        yield entry.name


def _any_in(folder: str) -> bool:
  return any(not BEFOREHAND.fullmatch(name) for name in os.listdir(folder))
