"""metrics.jsonl and events.jsonl: what a run leaves for people and tools to read.

metrics.jsonl has one object a line and a line a step; everything that depends on the clock stands
under `time`. When a run goes on from step n, lines after n are cut off, so that the file ends up as
if nothing had happened. events.jsonl only grows: it says what did happen.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from typing import Any


class Journal:
  """Appends whole lines to the two files of a workdir."""

  def __init__(self, metrics: pathlib.Path, events: pathlib.Path):
    self._metrics_path, self._events_path = metrics, events

  def resume(self, step: int) -> None:
    """Cuts metrics.jsonl after the line of `step`, and anything torn or out of order with it."""
    with open(self._metrics_path, "a+b") as file:
      file.seek(0)
      end, expected = 0, 1
      for line in file:
        if expected > step or not _is_line_of(line, expected):
          break
        end, expected = end + len(line), expected + 1
      file.truncate(end)
    if expected <= step:
      self.event("metrics_missing", first=expected, last=step)

  def step(self, line: dict[str, Any]) -> None:
    """Appends the metrics of a step."""
    _append(self._metrics_path, line)

  def event(self, kind: str, **fields: Any) -> None:
    """Appends what happened, with the time of day."""
    _append(self._events_path, {"event": kind, **fields, "time": {"unix_s": time.time()}})

  def sync(self) -> None:
    """Returns once all lines are on the disk, also if the machine loses power."""
    for path in (self._metrics_path, self._events_path):
      if path.exists():
        with open(path, "rb") as file:
          os.fsync(file.fileno())


def _append(path: pathlib.Path, line: dict[str, Any]) -> None:
  text = json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"
  # One write: a line is there or not, unless the machine itself goes down.
  with open(path, "ab", buffering=0) as file:
    file.write(text.encode())


def _is_line_of(line: bytes, step: int) -> bool:
  if not line.endswith(b"\n"):
    return False
  try:
    return json.loads(line)["step"] == step
  except (ValueError, KeyError, TypeError):
    return False
