"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, never silence."""

from __future__ import annotations

import collections
import contextlib
import math
import statistics
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxmoe.train.narrator import SILENCE_S, Narrator

_RECENT = 20  # steps whose median speed is shown; a single one's depends on when it was fetched


class Display(Narrator):
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
    self._started = (time.monotonic(), 0)
    self._running = contextlib.ExitStack()
    self._speeds: collections.deque[tuple[float, float]] = collections.deque(maxlen=_RECENT)

  def start(self, step: int) -> None:
    """Starts to count steps: with a bar on a terminal, else with a line now and then."""
    self._started = (time.monotonic(), step)
    if not self.console.is_terminal:
      self._running.enter_context(self.phase("training", brief=True))
      return
    columns = (BarColumn(12), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    self._bar = Progress(*columns, TimeRemainingColumn(compact=True), console=self.console)
    self._task = self._bar.add_task("train", total=self._num_steps, completed=step, text="")
    self._running.enter_context(self._bar)

  def step(self, line: dict[str, Any]) -> None:
    """Shows the metrics of a step."""
    step, clock, shown = line["step"], line["time"], self._learned(line)
    self._speeds.append((clock["tokens_per_s"], clock["mfu"]))
    tokens_per_s, mfu = map(statistics.median, zip(*self._speeds))
    speed = f"{tokens_per_s:,.0f} tok/s MFU {mfu:.0%}"
    if self._bar is not None:
      self._bar.update(self._task, completed=step, text=f"{shown} {speed}")
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
    since, first = self._started
    seconds = (time.monotonic() - since) / max(step - first, 1) * (self._num_steps - step)
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
