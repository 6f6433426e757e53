"""Prefetch: a thread that makes batches ahead of the one who takes them.

It is stopped and another one started when a state is restored. Its state always describes the
batches that were taken, not those made; a wait can be limited, so that a slow source is noticed.
"""

from __future__ import annotations

import collections
import json
import math
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import grain

from jaxmoe.data.batches import ProducedBatch
from jaxmoe.data.loader_callbacks import CurrentDocument

ReadFailure = tuple[str, str, str]
"""Domain, document, and why it could not be read at the first try."""

_PATIENCE_S = 5.0  # how long a thread that is in the middle of reading is waited for at the end


class BatchProducer(Protocol):
  """Makes batches; a thread of this process, or another process."""

  def take(self, timeout_s: float) -> ProducedBatch | None:
    """Returns the next batch, or None when none came within about `timeout_s`."""

  def reading(self) -> tuple[str, str]:
    """Returns (domain, document) of what is being read."""

  def failures(self) -> Iterator[ReadFailure]:
    """Yields the failures since the last call."""

  def state(self) -> Any:
    """Returns JSON-able values that `restore` continues from, after the batches taken."""

  def restore(self, state: Any) -> None:
    """Continues from a state."""

  def close(self) -> None:
    """Ends it; nothing can be taken afterwards."""


class PrefetchThread:
  """Batches of a dataset, up to `size` of them made ahead by a thread."""

  def __init__(
    self,
    dataset: grain.IterDataset,
    size: int,
    reading: CurrentDocument,
    failures: collections.deque[ReadFailure],
  ):
    self._iterator, self._size = iter(dataset), size
    self._reading, self._failures = reading, failures
    self._state = json.dumps(self._iterator.get_state())
    self._error: Exception | None = None
    # Runs at exit too, while the thread can still be joined.
    self._runs: list[_Run] = []
    self._close = weakref.finalize(self, _close, self._runs, self._iterator)

  def take(self, timeout_s: float) -> ProducedBatch | None:
    """Returns the next batch, or None when none came in time; raises what the thread raised."""
    if self._error is not None:
      raise self._error
    if not self._runs:
      self._runs.append(_Run(self._iterator, self._size))
    try:
      made = self._runs[0].made.get(timeout=max(timeout_s, 0))
    except queue.Empty:
      return None
    if isinstance(made, Exception):
      self._error = made
      raise made
    self._state, batch = made
    return batch

  def reading(self) -> tuple[str, str]:
    """Returns (domain, document) of what is being read."""
    return self._reading.document

  def failures(self) -> Iterator[ReadFailure]:
    """Yields the failures since the last call."""
    while self._failures:
      yield self._failures.popleft()

  def state(self) -> Any:
    """Returns the iterator's state after the batches taken."""
    return json.loads(self._state)

  def restore(self, state: Any) -> None:
    """Continues from a state."""
    for run in self._runs:
      run.end(math.inf)  # two threads must not share the iterator
    self._runs.clear()
    self._error = None
    self._iterator.set_state(_with_tuples(state))
    self._state = json.dumps(self._iterator.get_state())

  def close(self) -> None:
    """Stops the thread; one that hangs in a read is left behind."""
    self._close()


class _Run:
  """A thread that puts (state, batch) pairs, or the exception that ended it, into a queue."""

  def __init__(self, iterator: grain.DatasetIterator, size: int):
    self.made: queue.Queue[Any] = queue.Queue(maxsize=size)
    self._stopped = threading.Event()
    arguments = (iterator, self.made, self._stopped)
    self._thread = threading.Thread(target=_work, args=arguments, daemon=True, name="data")
    self._thread.start()

  def end(self, patience_s: float) -> bool:
    """Stops the thread; returns whether it ended in time."""
    self._stopped.set()
    until = time.monotonic() + patience_s
    while self._thread.is_alive() and time.monotonic() < until:
      while not self.made.empty():
        self.made.get_nowait()  # makes room: the thread may wait to put
      self._thread.join(0.02)
    return not self._thread.is_alive()


def _work(
  iterator: grain.DatasetIterator, made: queue.Queue[Any], stopped: threading.Event
) -> None:
  try:
    while not stopped.is_set():
      batch = next(iterator)
      # As text, since the iterator goes on changing its state.
      made.put((json.dumps(iterator.get_state()), batch))
  except Exception as error:
    made.put(error)


def _close(runs: list[_Run], iterator: grain.DatasetIterator) -> None:
  ended = [run.end(_PATIENCE_S) for run in runs]
  runs.clear()
  if all(ended):
    iterator.close()


def _with_tuples(plain: Any) -> Any:
  """Returns grain's state with pairs of numbers as tuples again.

  JSON made them lists, and grain compares them with a tuple: a row that starts a document would be
  taken for the rest of one.
  """
  if isinstance(plain, dict):
    return {name: _with_tuples(value) for name, value in plain.items()}
  if isinstance(plain, list):
    values = [_with_tuples(value) for value in plain]
    return tuple(values) if all(type(value) is int for value in values) else values
  return plain
