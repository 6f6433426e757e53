"""Progress on the console: no silence longer than 10 s without saying what takes so long."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console

from jaxmoe.core.terminal import escaped

SILENCE_S = 10.0


class ConsoleProgress:
  """Prints lines, and names the phases that take long."""

  def __init__(self, console: Console | None = None):
    self.console = console or Console(highlight=False, soft_wrap=True)
    self.last_line = time.monotonic()

  def say(self, text: str) -> None:
    """Prints a line."""
    self.console.print(escaped(text), markup=False)
    self.last_line = time.monotonic()

  @contextlib.contextmanager
  def phase(self, name: str, brief: bool = False) -> Iterator[None]:
    """Names what is going on while it goes on: `compiling train_step ...`, then its time.

    The name comes again, with the time so far, whenever 10 s went by without a line. A `brief`
    phase is not named unless it turns out to take that long.
    """
    start, done = time.monotonic(), threading.Event()

    def remind() -> None:
      while not done.wait(SILENCE_S / 10):
        now = time.monotonic()
        if now - max(start, self.last_line) >= SILENCE_S:
          self.say(f"{name} ... {now - start:.0f} s")

    if not brief:
      self.say(f"{name} ...")
    reminder = threading.Thread(target=remind, daemon=True)
    reminder.start()
    try:
      yield
    finally:
      done.set()
      reminder.join()
    if time.monotonic() - start >= (SILENCE_S if brief else 1):
      self.say(f"{name}: {time.monotonic() - start:.1f} s")
