"""The progress bar of a run on a terminal; plain lines elsewhere, never silence."""

from __future__ import annotations

import collections
import contextlib
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jaxmoe.train.console_progress import SILENCE_S, ConsoleProgress

_RECENT = 20  # steps whose median speed is shown
_PACE = 100  # steps whose mean says how long those to come take
BESIDE = ("evaluation", "samples", "checkpoint", "engine")
"""Categories of what is done every so many steps."""


def step_s(clocks: Iterable[Mapping[str, float]]) -> float:
  """Returns the mean seconds of steps and their data, without the slowest twentieth of them.

  Args:
    clocks: `time.seconds` of lines, of at least one.
  """
  took = sorted(clock.get("step", 0.0) + clock.get("data", 0.0) for clock in clocks)
  return statistics.fmean(took[: math.ceil(0.95 * len(took))])


class Pace:
  """How long a run has still to go, from its lines since it started or went on.

  A step to come takes what the last ones took; what is done every so many steps (evaluation,
  samples, checkpoints, an engine) takes its median, as often as it came so far. Neither the start
  of the process nor what was compiled comes again.
  """

  def __init__(self, first: int):
    self._first = first
    self._clocks: collections.deque[Mapping[str, float]] = collections.deque(maxlen=_PACE)
    self._beside: dict[str, list[float]] = {}
    self._beside_each: dict[str, float] = {}

  def add(self, step: int, seconds: Mapping[str, float]) -> None:
    """Takes `time.seconds` of a line."""
    if step == self._first + 2:  # the first step waits for much that comes once
      self._clocks.clear()
    self._clocks.append(seconds)
    for name in BESIDE:
      if name in seconds:
        found = self._beside.setdefault(name, [])
        found.append(seconds[name])
        every = (step - self._first) / len(found)
        self._beside_each[name] = statistics.median(found) / max(every, 1)

  def left_s(self, steps: int) -> float:
    """Returns the seconds that so many steps will take."""
    return steps * (step_s(self._clocks) + sum(self._beside_each.values())) if self._clocks else 0.0


class Display(ConsoleProgress):
  """Shows the progress of a run. Speeds are the median of the last steps.

  Args:
    num_steps: Of the run.
    log_every: Steps between two lines where there is no terminal.
    bytes_per_token: What makes bits per byte of losses; 0 if that is not known.
  """

  def __init__(self, num_steps: int, log_every: int, bytes_per_token: float):
    super().__init__()
    self._num_steps, self._log_every = num_steps, log_every
    self._bits = 1 / (math.log(2) * bytes_per_token) if bytes_per_token else None
    self._bar: Progress | None = None
    self._task: Any = None
    self._pace = Pace(0)
    self._running = contextlib.ExitStack()
    self._speeds: collections.deque[tuple[float, float]] = collections.deque(maxlen=_RECENT)

  def start(self, step: int) -> None:
    """Starts to count steps: with a bar on a terminal, else with a line now and then."""
    self._pace = Pace(step)
    if not self.console.is_terminal:
      self._running.enter_context(self.phase("training", brief=True))
      return
    columns = (BarColumn(12), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    self._bar = Progress(*columns, console=self.console)
    self._task = self._bar.add_task("train", total=self._num_steps, completed=step, text="")
    self._running.enter_context(self._bar)

  def step(self, line: dict[str, Any]) -> None:
    """Shows the metrics of a step."""
    step, clock, shown = line["step"], line["time"], self._learned(line)
    self._speeds.append((clock["tokens_per_s"], clock["mfu"]))
    tokens_per_s, mfu = map(statistics.median, zip(*self._speeds))
    speed = f"{tokens_per_s:,.0f} tok/s MFU {mfu:.0%}"
    self._pace.add(step, clock["seconds"])
    if self._bar is not None:
      text = f"{shown} {speed} {self._left(step)}"
      self._bar.update(self._task, completed=step, text=text)
      return
    quiet = time.monotonic() - self.last_line
    if step % self._log_every == 0 or step == self._num_steps or quiet > SILENCE_S:
      self.say(f"step {step}/{self._num_steps}  {shown}  {speed}  {self._left(step)} left")

  def close(self) -> None:
    """Ends what `start` started."""
    self._running.close()

  def _learned(self, line: dict[str, Any]) -> str:
    loss = line["loss"]
    if loss is None:
      return "no labels" if line.get("labels") == 0 else "loss not finite"
    bits = "" if self._bits is None else f"  {loss * self._bits:.3f} bits/byte"
    return f"loss {loss:.3f}{bits}"

  def _left(self, step: int) -> str:
    minutes, seconds = divmod(round(self._pace.left_s(self._num_steps - step)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
