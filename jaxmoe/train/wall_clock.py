"""The wall clock of this process: every second is booked once, in one category.

Lines of metrics.jsonl and some events carry what was booked since the one before (`take`), so that
the two files together account for the whole life of every process of a run (`goodput.py`). The
clock is monotonic: setting the time of day moves nothing.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from jaxmoe.train.pause_detector import PauseDetector


class WallClock:
  """Books wall time by category.

  Args:
    started_unix_s: When the process started; None for now.
    compile_s: Returns the seconds spent compiling so far; what a phase spends so is booked as
      `compile` instead.
    pauses: Knows for how long the process was stopped; that is booked as `paused` instead.
  """

  def __init__(
    self,
    started_unix_s: float | None = None,
    compile_s: Callable[[], float] = lambda: 0.0,
    pauses: PauseDetector | None = None,
  ):
    now = time.time()
    self.started_unix_s = now if started_unix_s is None else started_unix_s
    self.pauses = pauses or PauseDetector()
    self._compile_s = compile_s
    self._compiled = self._paused = 0.0
    self._mark = time.perf_counter() - max(now - self.started_unix_s, 0.0)
    self._open: list[str] = []
    self._pieces: list[tuple[float, float, str | None]] = []  # from, to, what; None: no phase

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Books the time inside as `name`; a phase inside a phase counts for itself alone."""
    self._book()
    self._open.append(name)
    try:
      yield
    finally:
      self._book()
      self._open.pop()

  def take(self, rest: str, until_s: float = math.inf) -> dict[str, float]:
    """Returns seconds by category since the last call; those outside all phases are `rest`.

    Args:
      rest: What they are.
      until_s: A moment of `time.perf_counter`; what was booked after it is left to the next call.
    """
    self._book()
    seconds, later = {rest: 0.0}, []
    for start, end, name in self._pieces:
      split = min(max(until_s, start), end)
      if split > start:
        seconds[name or rest] = seconds.get(name or rest, 0.0) + split - start
      if end > split:
        later.append((split, end, name))
    self._pieces = later
    return {name: round(value, 6) for name, value in seconds.items()}

  def _book(self) -> None:
    compiled, paused = self._compile_s(), self.pauses.beat()
    start, now = self._mark, time.perf_counter()
    compiling = min(max(compiled - self._compiled, 0.0), now - start)
    stopped = min(max(paused - self._paused, 0.0), now - start - compiling)
    self._mark, self._compiled, self._paused = now, compiled, paused
    busy = now - compiling - stopped
    named = self._open[-1] if self._open else None
    self._pieces.append((start, busy, named))
    self._pieces.append((busy, busy + compiling, "compile"))
    self._pieces.append((now - stopped, now, "paused"))
