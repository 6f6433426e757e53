"""Goodput: the wall time of a run by category, over all its processes, from its two files.

From the start of the first process to the last sign of life every second falls into one category:
`start` (interpreter, imports, reading the corpus, making or restoring the state), `compile`, `data`
(waiting for a batch), `step`, `evaluation`, `samples`, `checkpoint` (waiting for one), `engine`
(what replaces the state between steps), `report` (writing report.html at the end, which cannot tell
its own), `paused` (the process was stopped as a whole, by SIGSTOP or a frozen group), `lost` (what
a process did after its last checkpoint and another had to do again, or what a rollback threw away),
`down` (no process alive) and `other` (what a record calls otherwise). Goodput is the share of
`step`.

What a process did is the sum of what it booked, by a monotonic clock: setting the time of day moves
nothing. Only between processes there is no other clock than that, for the end of `lost` and for
`down`. What would be less than nothing there, because the clock was set back, counts as nothing and
is told; that it was set forwards cannot be seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

CATEGORIES = (
  "step", "data", "evaluation", "samples", "checkpoint", "engine", "compile", "start", "report",
  "paused", "lost", "down", "other",
)  # fmt: skip
_ENDS = ("done", "stopped", "failed")
_ALIKE_S = 5.0  # a disk's clock and a record may differ by this without a word


@dataclasses.dataclass(frozen=True)
class Goodput:
  """Seconds by category, in the order of `CATEGORIES`; they sum to `wall_s`.

  Attributes:
    seconds: By category.
    set_back_s: By how much the clock was seen to be set back between processes, which counts as no
      time.
  """

  seconds: dict[str, float]
  set_back_s: float = 0.0

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
    parts = [f"{name} {share:.1%}" for name, share in shares.items() if share >= 0.001]
    return f"{_clock(self.wall_s)} of wall time: {', '.join(parts)}{self.caveat}"

  @property
  def caveat(self) -> str:
    """What cannot be known of the wall time, as the end of a sentence; '' where all is known."""
    if not self.set_back_s:
      return ""
    return f"; at least, for the clock was set back by {_clock(self.set_back_s)} between processes"


def goodput(lines: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]) -> Goodput:
  """Returns where the wall time of a run went.

  Args:
    lines: The lines of metrics.jsonl, in order; a process that runs still is counted up to its last
      record.
    events: The lines of events.jsonl. Without a `process` event all seconds are 0.
  """
  seconds = dict.fromkeys(CATEGORIES, 0.0)
  lives = _lives(events)
  if not lives:
    return Goodput(seconds)
  for number, line in enumerate(lines, 1):
    clock = line.get("time", {})
    _add(seconds, clock.get("seconds", {}))
    _writer(lives, line.get("step", number)).line_unix_s = clock.get("unix_s", 0.0)
  set_back_s = 0.0
  for number, life in enumerate(lives):
    _add(seconds, life.seconds)
    if number + 1 < len(lives):
      last, end = life.ends()
      for name, passed in (("lost", end - last), ("down", lives[number + 1].started_unix_s - end)):
        seconds[name] += max(passed, 0.0)
        set_back_s += -passed if passed < -_ALIKE_S else 0.0
  return Goodput(seconds, set_back_s)


@dataclasses.dataclass
class _Life:
  """What the files say of one process.

  Attributes:
    started_unix_s: When it began.
    first: The step its lines come after; None as long as it has not begun to train.
    event_unix_s: When it wrote its last event that books time.
    line_unix_s: When it wrote its last line that is there, 0 if none is.
    cut_unix_s: When it wrote the last of its lines that were cut off.
    alive_unix_s: When it gave its last sign of life, 0 if that is not known.
    ended: Whether it said that it ended.
    seconds: What events have booked.
  """

  started_unix_s: float
  first: int | None
  event_unix_s: float
  line_unix_s: float = 0.0
  cut_unix_s: float = 0.0
  alive_unix_s: float = 0.0
  ended: bool = False
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)

  def ends(self) -> tuple[float, float]:
    """Returns when it wrote its last record, and when it ended: it may have lived on in silence.

    A record from before the clock was set back seems to be later than the last sign of life.
    """
    if self.ended:
      return self.event_unix_s, self.event_unix_s
    records = [at for at in (self.event_unix_s, self.line_unix_s, self.cut_unix_s) if at]
    if not self.alive_unix_s:
      return max(records), max(records)
    before = [at for at in records if at <= self.alive_unix_s + _ALIKE_S]
    last = max(before, default=min(records))
    return last, max(self.alive_unix_s, last) if before else self.alive_unix_s


def _lives(events: Iterable[Mapping[str, Any]]) -> list[_Life]:
  lives: list[_Life] = []
  for event in events:
    clock = event.get("time", {})
    if event["event"] == "process":
      if lives:
        lives[-1].alive_unix_s = clock.get("last_alive_unix_s") or 0.0
      started = clock["started_unix_s"]
      lives.append(_Life(started, None if lives else 0, started))
    if not lives:
      continue
    life = lives[-1]
    booked = dict(clock.get("seconds", {}))
    if "lost_s" in clock:
      booked["lost"] = booked.get("lost", 0.0) + clock["lost_s"]
    _add(life.seconds, booked)
    if event["event"] in ("start", "resume"):
      life.first = event.get("step", 0)
    if clock.get("lost_until_unix_s"):  # written by an earlier process, in lines that were cut
      wrote = next((one for one in reversed(lives[:-1]) if one.first is not None), life)
      wrote.cut_unix_s = clock["lost_until_unix_s"]
    life.ended = life.ended or event["event"] in _ENDS
    if clock.get("seconds") or event["event"] in ("rollback", *_ENDS):
      life.event_unix_s = clock.get("unix_s", life.event_unix_s)
  return lives


def _writer(lives: list[_Life], step: int) -> _Life:
  """Returns the process that wrote the line of a step: the last that began before it."""
  return next(
    (one for one in reversed(lives) if one.first is not None and one.first < step), lives[0]
  )


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
  for name, value in more.items():
    name = name if name in CATEGORIES else "other"
    total[name] = total.get(name, 0.0) + value


def _clock(seconds: float) -> str:
  """Returns seconds as `m:ss` or `h:mm:ss`."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
