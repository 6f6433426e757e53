"""Where the wall time of a run went, over all its processes, from its two files alone.

From the start of the first process to the last sign of life every second falls into one category:
`start` (interpreter, imports, reading the corpus, making or restoring the state), `compile`, `data`
(waiting for a batch), `step`, `evaluation`, `samples`, `checkpoint` (waiting for one), `report`
(writing report.html at the end, which cannot tell its own), `lost` (what
a process did after its last checkpoint and another had to do again, or what a rollback threw away),
`down` (no process alive) and `other` (what none of the records accounts for: clocks and rounding).
Goodput is the share of `step`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

CATEGORIES = (
  "step", "data", "evaluation", "samples", "checkpoint", "compile", "start", "report", "lost",
  "down", "other",
)  # fmt: skip
_ENDS = ("done", "stopped", "failed")


@dataclasses.dataclass(frozen=True)
class Goodput:
  """Seconds by category, in the order of `CATEGORIES`; they sum to `wall_s`."""

  seconds: dict[str, float]

  @property
  def wall_s(self) -> float:
    """From the start of the first process to the last sign of life."""
    return sum(self.seconds.values())

  @property
  def share(self) -> float:
    """The share of wall time in which the model was trained, and not in vain."""
    return self.seconds["step"] / max(self.wall_s, 1e-9)

  def __str__(self) -> str:
    """One line: the wall time, and the share of every category that has at least 0.1% of it."""
    wall_s = max(self.wall_s, 1e-9)
    shares = {name: seconds / wall_s for name, seconds in self.seconds.items()}
    told = [f"{name} {share:.1%}" for name, share in shares.items() if abs(share) >= 0.001]
    minutes, seconds = divmod(round(self.wall_s), 60)
    return f"{minutes}:{seconds:02d} of wall time: {', '.join(told)}"


def goodput(lines: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]) -> Goodput:
  """Returns where the wall time of a run went.

  Args:
    lines: The lines of metrics.jsonl; a process that runs still is counted up to its last record.
    events: The lines of events.jsonl. Without a `process` event all seconds are 0.
  """
  seconds = dict.fromkeys(CATEGORIES, 0.0)
  lives = _lives(events)
  if not lives:
    return Goodput(seconds)
  for line in lines:
    clock = line.get("time", {})
    _add(seconds, clock.get("seconds", {}))
    life = _life_at(lives, clock.get("unix_s", 0.0))
    life.last_unix_s = max(life.last_unix_s, clock.get("unix_s", 0.0))
  for number, life in enumerate(lives):
    _add(seconds, life.seconds)
    if number + 1 < len(lives):
      end = life.last_unix_s if life.ended else max(life.alive_unix_s, life.last_unix_s)
      seconds["lost"] += end - life.last_unix_s
      seconds["down"] += max(lives[number + 1].started_unix_s - end, 0.0)
  wall = lives[-1].last_unix_s - lives[0].started_unix_s
  seconds["other"] = 0.0  # whatever a record may have called so
  seconds["other"] = wall - sum(seconds.values())
  return Goodput(seconds)


@dataclasses.dataclass
class _Life:
  """What events say of one process."""

  started_unix_s: float
  last_unix_s: float
  alive_unix_s: float = 0.0
  ended: bool = False
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def _lives(events: Iterable[Mapping[str, Any]]) -> list[_Life]:
  lives: list[_Life] = []
  for event in events:
    clock = event.get("time", {})
    if event["event"] == "process":
      if lives:
        lives[-1].alive_unix_s = clock.get("last_alive_unix_s") or 0.0
      lives.append(_Life(clock["started_unix_s"], clock["started_unix_s"]))
    if not lives:
      continue
    life = lives[-1]
    booked = dict(clock.get("seconds", {}))
    if "lost_s" in clock:
      booked["lost"] = booked.get("lost", 0.0) + clock["lost_s"]
    _add(life.seconds, booked)
    if clock.get("lost_until_unix_s"):  # written by an earlier process, in lines that were cut
      before = _life_at(lives[:-1] or lives, clock["lost_until_unix_s"])
      before.last_unix_s = max(before.last_unix_s, clock["lost_until_unix_s"])
    if clock.get("seconds") or event["event"] == "rollback":
      life.last_unix_s = max(life.last_unix_s, clock["unix_s"])
    life.ended = life.ended or event["event"] in _ENDS
  return lives


def _life_at(lives: list[_Life], unix_s: float) -> _Life:
  """Returns the process that lived at a time."""
  return next((life for life in reversed(lives) if life.started_unix_s <= unix_s), lives[0])


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
  for name, value in more.items():
    name = name if name in CATEGORIES else "other"
    total[name] = total.get(name, 0.0) + value
