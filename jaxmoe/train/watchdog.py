"""A watchdog thread that ends a run which has stopped moving, and says where it stands.

A hung file system, a dead peer or a deadlock leaves a process that lives for ever and does nothing.
Whoever trains says `beat` when something begins; when nothing new has begun for the limit, all
stacks are written down and the process ends with a code that a supervisor takes for "start again".
"""

from __future__ import annotations

import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable

STALLED = 42
_TICK_S = 0.25
_LAST_WORDS_S = 10.0  # what writing down the stacks may take on a disk that hangs


class Watchdog:
  """Watches that `beat` comes at least every `limit_s` seconds; 0 watches nothing.

  Args:
    limit_s: The limit. Time in which the whole process was stopped does not count.
    stalled: Called with what had begun, and how many seconds ago.
    tick: Called about four times a second, as a sign of life.
  """

  def __init__(
    self,
    limit_s: float,
    stalled: Callable[[str, float], None],
    tick: Callable[[], None] = lambda: None,
  ):
    self._limit_s, self._stalled, self._tick = limit_s, stalled, tick
    self._beats, self._doing = 0, "start"
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

  def start(self) -> None:
    """Starts to watch."""
    self._thread.start()

  def stop(self) -> None:
    """Ends watching."""
    self._end.set()
    self._thread.join()

  def beat(self, doing: str) -> None:
    """Says that something new has begun."""
    self._doing = doing
    self._beats += 1

  def _watch(self) -> None:
    seen, waited_s, last = self._beats, 0.0, time.monotonic()
    while not self._end.wait(_TICK_S):
      self._tick()
      now = time.monotonic()
      # A thread that slept far longer was stopped with its process, by a signal or a closed lid.
      waited_s, last = waited_s + min(now - last, 4 * _TICK_S), now
      if seen != self._beats:
        seen, waited_s = self._beats, 0.0
      elif self._limit_s and waited_s > self._limit_s:
        self._stalled(self._doing, waited_s)
        return


def dump_and_end(
  stacks: pathlib.Path, line: str, report: Callable[[], None], end: Callable[[int], None] = os._exit
) -> None:
  """Writes the stacks of all threads to standard error and a file, and ends the process.

  Args:
    stacks: The file.
    line: What is printed below the stacks.
    report: Called before the end; it may hang.
    end: Takes the exit code.
  """
  hurry = threading.Timer(_LAST_WORDS_S, end, [STALLED])
  hurry.daemon = True
  hurry.start()
  faulthandler.dump_traceback(sys.__stderr__ or 2)
  print(f"error: {line}", file=sys.stderr, flush=True)
  try:
    with open(stacks, "w") as file:
      faulthandler.dump_traceback(file)
    report()
  finally:
    end(STALLED)
