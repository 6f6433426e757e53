"""Where the wall time of this process goes: every second is booked once, in one category.

Lines of metrics.jsonl and some events carry what was booked since the one before (`take`), so that
the two files together account for the whole life of every process of a run (`goodput.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class Ledger:
  """Books wall time by category.

  Args:
    started_unix_s: When the process started; None for now.
    compile_s: Returns the seconds spent compiling so far; what a phase spends so is booked as
      `compile` instead.
  """

  def __init__(
    self, started_unix_s: float | None = None, compile_s: Callable[[], float] = lambda: 0.0
  ):
    now = time.time()
    self.started_unix_s = now if started_unix_s is None else started_unix_s
    self._compile_s = compile_s
    self._compiled = 0.0
    self._mark = time.perf_counter() - max(now - self.started_unix_s, 0.0)
    self._open: list[str] = []
    self._booked: dict[str, float] = {}
    self._between = 0.0

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

  def take(self, rest: str) -> dict[str, float]:
    """Returns seconds by category since the last call; those outside all phases are `rest`."""
    self._book()
    seconds, between = self._booked, self._between
    self._booked, self._between = {}, 0.0
    seconds[rest] = seconds.get(rest, 0.0) + between
    return {name: round(value, 6) for name, value in seconds.items()}

  def _book(self) -> None:
    now, compiled = time.perf_counter(), self._compile_s()
    passed = now - self._mark
    compiling = min(max(compiled - self._compiled, 0.0), passed)
    self._mark, self._compiled = now, compiled
    if compiling:
      self._booked["compile"] = self._booked.get("compile", 0.0) + compiling
    if self._open:
      name = self._open[-1]
      self._booked[name] = self._booked.get(name, 0.0) + passed - compiling
    else:
      self._between += passed - compiling
