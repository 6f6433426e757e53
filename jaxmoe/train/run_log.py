"""The run log, metrics.jsonl and events.jsonl: what a run leaves for people and tools to read.

metrics.jsonl has one object a line and a line a step; everything that depends on the clock stands
under `time`. When a run goes on from step n, or goes back to it, lines after n are cut off, so that
the file ends up as if nothing had happened. events.jsonl only grows: it says what did happen.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxmoe.train.append_file import AppendFile, NoFile
from jaxmoe.train.reverse_lines import parse


@dataclasses.dataclass(frozen=True)
class CutLines:
  """The lines of metrics.jsonl that were cut off.

  Attributes:
    steps: How many.
    seconds: The wall time they accounted for.
    last_unix_s: When the last of them was written, 0 if none says so.
  """

  steps: int = 0
  seconds: float = 0.0
  last_unix_s: float = 0.0


class RunLog:
  """Appends whole lines to the two files of a workdir; never raises for a disk that refuses them.

  Args:
    metrics: Path of metrics.jsonl.
    events: Path of events.jsonl.
    say: Told once when lines have to wait in memory, and once when they are written.
  """

  def __init__(
    self,
    metrics: pathlib.Path,
    events: pathlib.Path,
    say: Callable[[str], None] = lambda text: None,
  ):
    self._metrics, self._events, self._say = AppendFile(metrics), AppendFile(events), say
    self._files = [self._metrics, self._events]
    self._late = ""

  def also(self, path: pathlib.Path) -> AppendFile:
    """Returns another file that grows with the run; `sync` covers it too."""
    self._files.append(AppendFile(path))
    return self._files[-1]

  def resume(self, step: int) -> CutLines:
    """Cuts metrics.jsonl after the line of `step`, and anything torn or out of order with it."""
    self._metrics.flush()
    waiting = [(_step_of(piece) or 0, piece) for piece in self._metrics.pending]
    self._metrics.pending[:] = [piece for of, piece in waiting if of <= step]
    with open(self._metrics.path, "a+b") as file:
      file.seek(0)
      end, expected = 0, 1
      for line in file:
        if expected > step or _step_of(line) != expected:
          break
        end, expected = end + len(line), expected + 1
      file.seek(end)
      cut = _measure(file.readlines() + [piece for of, piece in waiting if of > step])
      file.truncate(end)
    expected += len(self._metrics.pending)
    if expected <= step:
      self.event("metrics_missing", first=expected, last=step)
    return cut

  def step(self, line: dict[str, Any]) -> None:
    """Appends the metrics of a step."""
    self._append(self._metrics, line)

  def event(self, kind: str, time: dict[str, Any] | None = None, **fields: Any) -> None:
    """Appends what happened, with the time of day; `time` adds to what depends on the clock."""
    clock = {"unix_s": _now(), **(time or {})}
    self._append(self._events, {"event": kind, **fields, "time": clock})

  def sync(self) -> None:
    """Returns once all lines are on the disk, also if the machine loses power.

    Raises:
      OSError: the disk refuses them; they stay in memory.
    """
    for file in self._files:
      file.sync()

  def _append(self, file: AppendFile, line: dict[str, Any]) -> None:
    text = json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"
    why = file.append(text.encode())
    if why and not self._late:
      self._say(f"cannot write {file.path}: {why}; its lines wait in memory, the run goes on")
    waited, self._late = self._late, why or self._late
    if not waited or any(each.flush() for each in self._files):
      return
    self._late = ""
    self._say(f"{file.path.parent}: the lines that had to wait are written")
    self.event("journal_late", why=waited)


class NoRunLog(RunLog):
  """Takes lines and writes none: for the processes of a run other than the first."""

  def __init__(self) -> None:
    super().__init__(pathlib.Path(os.devnull), pathlib.Path(os.devnull))

  def also(self, path: pathlib.Path) -> AppendFile:
    """Returns a file that takes pieces and keeps none."""
    return NoFile(path)

  def resume(self, step: int) -> CutLines:
    """Returns that nothing was cut."""
    return CutLines()

  def step(self, line: dict[str, Any]) -> None:
    """Takes the metrics of a step."""

  def event(self, kind: str, time: dict[str, Any] | None = None, **fields: Any) -> None:
    """Takes what happened."""

  def sync(self) -> None:
    """Returns: there is nothing to write."""


def read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the objects of a file of JSON lines; lines that are torn or none are left out."""
  if not path.exists():
    return
  with open(path, "rb") as file:
    for line in file:
      value = parse(line) if line.endswith(b"\n") else None
      if value is not None:
        yield value


def _now() -> float:
  return round(time.time(), 3)


def _step_of(line: bytes) -> int | None:
  """Returns the step of a whole line, None for anything else."""
  return (parse(line) or {}).get("step") if line.endswith(b"\n") else None


def _measure(lines: list[bytes]) -> CutLines:
  """Returns what the whole ones of some lines say of their time."""
  times = [json.loads(line).get("time", {}) for line in lines if _step_of(line) is not None]
  seconds = sum(sum(clock.get("seconds", {}).values()) for clock in times)
  # The last, not the largest: the clock may have been set back meanwhile.
  times_s = [clock["unix_s"] for clock in times if "unix_s" in clock]
  return CutLines(len(times), round(seconds, 3), times_s[-1] if times_s else 0.0)
