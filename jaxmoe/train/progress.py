"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, never silence."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SILENCE_S = 10.0


class Display:
  """Shows the progress of a run.

  A phase that takes long is named when it starts and again every 10 s, with the time it has taken.
  """

  def __init__(self, num_steps: int, log_every: int, bytes_per_token: float):
    self._console = Console(highlight=False, soft_wrap=True)
    self._num_steps, self._log_every = num_steps, log_every
    self._bits = 1 / (math.log(2) * max(bytes_per_token, 1e-9))
    self._bar: Progress | None = None
    self._task: Any = None
    self._started = (time.monotonic(), 0)
    self._last_line = time.monotonic()

  def say(self, text: str) -> None:
    """Prints a line."""
    self._console.print(text, markup=False)
    self._last_line = time.monotonic()

  @contextlib.contextmanager
  def phase(self, name: str, brief: bool = False) -> Iterator[None]:
    """Names what is going on while it goes on: `compiling train_step ...`, then its time.

    A `brief` phase is not named unless it turns out to take long.
    """
    start, done = time.monotonic(), threading.Event()

    def remind() -> None:
      while not done.wait(_SILENCE_S):
        self.say(f"{name} ... {time.monotonic() - start:.0f} s")

    if not brief:
      self.say(f"{name} ...")
    reminder = threading.Thread(target=remind, daemon=True)
    reminder.start()
    try:
      yield
    finally:
      done.set()
      reminder.join()
    if time.monotonic() - start >= (_SILENCE_S if brief else 1):
      self.say(f"{name}: {time.monotonic() - start:.1f} s")

  def start(self, step: int) -> None:
    """Starts to count steps; a bar appears if this is a terminal."""
    self._started = (time.monotonic(), step)
    if not self._console.is_terminal:
      return
    columns = (BarColumn(12), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    self._bar = Progress(*columns, TimeRemainingColumn(compact=True), console=self._console)
    self._task = self._bar.add_task("train", total=self._num_steps, completed=step, text="")
    self._bar.start()

  def step(self, line: dict[str, Any]) -> None:
    """Shows the metrics of a step."""
    step, loss, clock = line["step"], line["loss"], line["time"]
    bits = "not finite" if loss is None else f"{loss * self._bits:.3f} bits/byte"
    shown = "loss not finite" if loss is None else f"loss {loss:.3f}"
    speed = f"{clock['tokens_per_s']:,.0f} tok/s MFU {clock['mfu']:.0%}"
    if self._bar is not None:
      self._bar.update(self._task, completed=step, text=f"{shown} {bits} {speed}")
      return
    quiet = time.monotonic() - self._last_line
    if step % self._log_every == 0 or step == self._num_steps or quiet > _SILENCE_S:
      self.say(f"step {step}/{self._num_steps}  {shown}  {bits}  {speed}  {self._left(step)} left")

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  def _left(self, step: int) -> str:
    since, first = self._started
    seconds = (time.monotonic() - since) / max(step - first, 1) * (self._num_steps - step)
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
