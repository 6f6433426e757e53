"""Metrics sinks besides metrics.jsonl: each in a thread of its own, so that none hurts a run.

A sink that is slow loses lines, one that raises is switched off, one that hangs is left behind when
the run ends. Each is told in a line and an event, by the thread of the run: journals and displays
need to know nothing of threads.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

MAX_FAILURES = 3
"""Failed writes in a row after which a sink is switched off."""

MAX_WAITING = 100
"""Lines that wait for a slow sink; the next are dropped."""

FEW = 16
"""Lists of up to so many numbers become a scalar each, such as the loads of a few experts."""


class Sink(Protocol):
  """A place that is given the metrics of steps. Its methods are called in one thread, in order."""

  name: str

  def resume(self, step: int) -> None:
    """Starts, or goes on after a rollback: the next line is that of `step + 1`.

    Points of later steps, of this process or of one before it, are of no value any more.
    """

  def write(self, line: dict[str, Any]) -> None:
    """Takes the line of a step."""

  def close(self) -> None:
    """Puts in safety what it has."""


class Sinks:
  """Hands the lines of a run to its sinks and returns at once: the loop sees them as one."""

  def __init__(
    self, sinks: Sequence[Sink], event: Callable[..., None], say: Callable[[str], None]
  ):
    """Takes the sinks, and what writes an event and prints a line about one that fails."""
    self._couriers = [_Courier(sink) for sink in sinks]
    self._event, self._say = event, say
    self._started = False

  def __call__(self, line: dict[str, Any]) -> None:
    """Hands on the line of a step, which must not be changed afterwards."""
    if not self._started:
      self.rollback(line["step"] - 1)
    for courier in self._couriers:
      courier.put(lambda sink: sink.write(line))
    self._report_failures()

  def rollback(self, step: int) -> None:
    """Tells that the next line is that of `step + 1`, whatever was handed on before."""
    self._started = True
    for courier in self._couriers:
      courier.put(lambda sink: sink.resume(step), vital=True)
    self._report_failures()

  def close(self, timeout_s: float = 5.0) -> None:
    """Waits until the lines are written, but no longer than `timeout_s` in all."""
    deadline = time.monotonic() + timeout_s
    for courier in self._couriers:
      courier.stop()
    for courier in self._couriers:
      courier.join(max(deadline - time.monotonic(), 0), timeout_s)
    self._report_failures()
    for courier in self._couriers:
      if courier.lost and courier.reported is None:
        why = f"{courier.dropped} lines were dropped, too slow, and {courier.failed} failed"
        self._report(courier, why)

  def _report_failures(self) -> None:
    for courier in self._couriers:
      if courier.why is not None and courier.reported is None:
        self._report(courier, courier.why)

  def _report(self, courier: _Courier, why: str) -> None:
    courier.reported = why
    self._event("sink_failed", sink=courier.sink.name, why=why)
    self._say(f"sink {courier.sink.name}: {why}; the run itself is not touched")


class _Courier:
  """One sink, its queue and its thread. Only the thread writes `why`; `reported` is the run's."""

  def __init__(self, sink: Sink):
    self.sink = sink
    self.why: str | None = None
    self.reported: str | None = None
    self.dropped = 0  # by the run's thread
    self.failed = 0  # by this one
    self._todo: queue.SimpleQueue[tuple[Callable[[Sink], None], bool] | None] = queue.SimpleQueue()
    name = f"sink-{sink.name}"
    self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
    self._thread.start()

  @property
  def lost(self) -> int:
    """Lines that the sink did not take."""
    return self.dropped + self.failed

  def put(self, act: Callable[[Sink], None], vital: bool = False) -> None:
    """Queues something to do; drops it if too much waits and it is not vital."""
    if self.why is not None:
      return
    if self._todo.qsize() >= MAX_WAITING and not vital:
      self.dropped += 1
    else:
      self._todo.put((act, vital))

  def stop(self) -> None:
    """Ends the thread once it has done what is queued."""
    self._todo.put(None)

  def join(self, wait_s: float, all_s: float) -> None:
    """Waits for the thread; one that does not end is left behind and said to have hung."""
    self._thread.join(wait_s)
    if self._thread.is_alive() and self.why is None:
      waiting = max(self._todo.qsize() - 1, 0) + self.dropped
      self.why = f"did not finish within {all_s:g} s; {waiting} lines were left"

  def _serve(self) -> None:
    failures = 0
    while self.why is None and (job := self._todo.get()) is not None:
      act, vital = job
      try:
        act(self.sink)
        failures = 0
      except BaseException as error:  # not even an exit of a sink's library ends a run
        failures += 1
        self.failed += not vital
        if vital or failures >= MAX_FAILURES:
          self.why = f"switched off: {_one_line(error)}"
    try:
      self.sink.close()
    except BaseException as error:
      self.why = self.why or f"its end failed: {_one_line(error)}"


def flatten(line: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, list[float]]]:
  """Returns the numbers of a line by path, such as `layers/0/load_entropy`, and its longer lists.

  Left out are the step, the time of day, counts (they stand in metrics.jsonl) and what is None
  because it was not finite.
  """
  scalars: dict[str, float] = {}
  lists: dict[str, list[float]] = {}

  def add(path: str, value: Any) -> None:
    if isinstance(value, Mapping):
      for name, child in value.items():
        if name not in ("counts", "unix_s"):
          add(f"{path}/{name}" if path else name, child)
    elif isinstance(value, list) and len(value) <= FEW:
      for index, child in enumerate(value):
        add(f"{path}/{index}", child)
    elif isinstance(value, list):
      lists[path] = [float(child) for child in value if isinstance(child, int | float)]
    elif isinstance(value, int | float) and path != "step":
      scalars[path] = float(value)

  add("", line)
  return scalars, lists


def _one_line(error: BaseException) -> str:
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
