"""Pauses of the whole process: a stop signal, a frozen control group, a machine that slept.

Nobody is told of SIGSTOP. A thread that beats many times a second finds out afterwards: no beat for
a second, in which the process used no more processor time than between two beats, is time in which
it did not run. A thread that only waits for the interpreter's lock sees processor time go by.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

BEAT_S = 0.05
LEAST_S = 1.0
_CORES = os.cpu_count() or 1


class PauseDetector:
  """Counts the seconds for which this process was stopped; none while it is not `running`."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._runs = False
    self._last = self._used = self._stopped_s = 0.0

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Beats inside."""
    end = threading.Event()
    thread = threading.Thread(
      target=self._beat_until, args=(end,), daemon=True, name="pause_detector"
    )
    self.beat()
    self._runs = True
    thread.start()
    try:
      yield
    finally:
      self._runs = False
      end.set()
      thread.join()

  def beat(self) -> float:
    """Returns the seconds stopped so far; what lies before the last beat of any thread is past.

    Stops shorter than about a second are not noticed.
    """
    with self._lock:
      now, used = time.monotonic(), time.process_time()
      gap = now - self._last
      if self._runs and gap > LEAST_S and used - self._used < min(gap / 2, 2 * BEAT_S * _CORES):
        self._stopped_s += gap - BEAT_S
      self._last, self._used = now, used
      return self._stopped_s

  def _beat_until(self, end: threading.Event) -> None:
    while not end.wait(BEAT_S):
      self.beat()
