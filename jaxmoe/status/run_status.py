"""A snapshot of a run from its files, in a fraction of a second and without JAX."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.train.goodput import Goodput, goodput
from jaxmoe.train.lock import is_held
from jaxmoe.train.reverse_lines import clock_of, lines_back, parse
from jaxmoe.train.run_log import read_lines
from jaxmoe.train.saved_steps import check_saved

RECENT = 20
"""Lines whose median speed is told."""

SEARCHED_BYTES = 32 << 20
"""How far back from its end metrics.jsonl is searched for scores."""

SUMMED_BYTES = 64 << 20
"""Up to this size of metrics.jsonl all its times are summed."""

ENDS = ("done", "stopped", "failed", "stalled")


@dataclasses.dataclass(frozen=True)
class RunStatus:
  """A run at one moment.

  Attributes:
    path: Its folder.
    held: Whether a process of this machine holds the folder.
    config: Its recipe as plain values.
    lines: The last lines of metrics.jsonl, oldest first.
    scored: The last line with held-out scores, if it is near enough to the end.
    whole: The scores of all held-out text in eval.json, if they are there.
    events: All events.
    checkpoints: When each was written, by step.
    missing: What is wrong where steps were saved and none is there; else ''.
    goodput: Where the wall time went, if the files say it and are small enough to sum.
    alive_unix_s: When the run gave its last sign of life, 0 if it never did.
    now_unix_s: When all this was read.
  """

  path: pathlib.Path
  held: bool
  config: dict[str, Any]
  lines: list[dict[str, Any]]
  scored: dict[str, Any] | None
  whole: dict[str, Any] | None
  events: list[dict[str, Any]]
  checkpoints: dict[int, float]
  missing: str
  goodput: Goodput | None
  alive_unix_s: float
  now_unix_s: float

  def last_event(self, *kinds: str) -> dict[str, Any] | None:
    """Returns the last event of some kinds."""
    return next((event for event in reversed(self.events) if event["event"] in kinds), None)

  def count(self, kind: str) -> int:
    """Returns how many events there are of a kind."""
    return sum(event["event"] == kind for event in self.events)

  @property
  def state(self) -> str:
    """`running`, `done`, `stopped`, `failed`, `stalled`, `killed`, `untrained`, or `elsewhere`.

    `untrained`: no process has held the folder, as after surgery. `elsewhere`: it did not end, and
    the machine it last ran on is another one.
    """
    last = self.last_event("process", "start", "resume", *ENDS)
    if last is not None and last["event"] in ENDS:
      return last["event"]
    if self.held:
      return "running"
    if last is None and not self.alive_unix_s:
      return "untrained"
    process = self.last_event("process")
    there = process is not None and process.get("host") not in (None, socket.gethostname())
    return "elsewhere" if there else "killed"


def read_status(path: pathlib.Path) -> RunStatus:
  """Returns what the files in the folder of a run say now.

  Raises:
    CheckpointError: there is no run in the folder.
    InputError: its config.json is damaged.
  """
  config = _config(path)
  lines, scored = _tail(path / "metrics.jsonl")
  events = [event for event in read_lines(path / "events.jsonl") if "event" in event]
  pids = [event["pid"] for event in events if isinstance(event.get("pid"), int)]
  return RunStatus(
    path=path,
    held=is_held(path / "lock", pids[-1] if pids else None),
    config=config,
    lines=lines,
    scored=scored,
    whole=_whole(path / "eval.json"),
    events=events,
    checkpoints=_checkpoints(path / "checkpoints"),
    missing=_missing(path),
    goodput=_goodput(path / "metrics.jsonl", events),
    alive_unix_s=max(_written(path / "lock"), _written(path / "metrics.jsonl")),
    now_unix_s=time.time(),
  )


def _config(path: pathlib.Path) -> dict[str, Any]:
  file = path / "config.json"
  if not os.path.isfile(file):
    raise CheckpointError(f"{path}: no run here (no config.json); train one first")
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(f"{file}: cannot be read ({error}); restore the file") from None
  if not isinstance(config, dict):
    raise InputError(f"{file}: holds no recipe; restore the file")
  return config


def _whole(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns the scores of `jaxmoe evaluate`, None if there are none."""
  try:
    scores = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None
  good = isinstance(scores, dict) and isinstance(scores.get("step"), int)
  return scores if good and isinstance(scores.get("domains"), dict) else None


def _tail(path: pathlib.Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
  """Returns the last lines, oldest first, and the last one with scores."""
  lines: list[dict[str, Any]] = []
  scored, seen = None, 0
  if not path.exists():
    return lines, scored
  with open(path, "rb") as file:
    for raw in lines_back(file):
      seen += len(raw)
      wanted = len(lines) < RECENT or b'"eval":' in raw
      line = parse(raw) if wanted else None
      if line is not None and "step" in line:
        if len(lines) < RECENT:
          lines.append(line)
        if isinstance(line.get("eval"), Mapping):
          scored = scored or line
      if len(lines) >= RECENT and (scored or seen > SEARCHED_BYTES):
        break
  return lines[::-1], scored


def _goodput(path: pathlib.Path, events: list[dict[str, Any]]) -> Goodput | None:
  if not path.exists() or path.stat().st_size > SUMMED_BYTES:
    return None
  processes = [event.get("time", {}) for event in events if event["event"] == "process"]
  if not processes or any("started_unix_s" not in clock for clock in processes):
    return None
  with open(path, "rb") as file:
    lines = [line for line in map(clock_of, file) if line is not None]
  return goodput(lines, events)


def _checkpoints(path: pathlib.Path) -> dict[int, float]:
  try:
    entries = [entry for entry in os.scandir(path) if entry.name.isdigit()]
  except OSError:
    return {}
  return {int(entry.name): _written(pathlib.Path(entry.path)) for entry in entries}


def _missing(path: pathlib.Path) -> str:
  try:
    check_saved(path / "checkpoints", path / "events.jsonl")
  except (CheckpointError, InputError) as error:
    return str(error)
  return ""


def _written(path: pathlib.Path) -> float:
  try:
    return path.stat().st_mtime
  except OSError:
    return 0.0
