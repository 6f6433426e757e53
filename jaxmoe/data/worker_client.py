"""The client of a data worker: batches made by another process, which may die or stop.

The parent keeps the state after the batch it took last. A worker whose pipe ends, or that says
nothing while a batch is awaited, is killed, and another one goes on from that state.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.data.batches import ProducedBatch
from jaxmoe.data.loader_callbacks import LoaderCallbacks
from jaxmoe.data.prefetch import ReadFailure
from jaxmoe.data.worker_protocol import Frame, read_batch, read_frame

_COMMAND = ("-m", "jaxmoe.data.worker")
_AHEAD = 4  # batches that wait in the parent, beside those that wait in the worker
_START_S = 120.0  # silence allowed to a worker that has not said anything yet: Python starts
_MAX_RESTARTS = 3  # without a batch in between


class WorkerClient:
  """The producer of batches in another process.

  Args:
    job: {data, cache_dir, stream, fingerprint}: the recipe of the data as plain values, where
      tokenizers are kept, the arguments of `Corpus.prefetch`, and what the worker must find.
    state: Of the iterator, to begin with.
    callbacks: Who is told of restarts.
  """

  def __init__(self, job: dict[str, Any], state: Any, callbacks: LoaderCallbacks):
    self._job, self._state, self._callbacks = job, json.dumps(state), callbacks
    self._generation, self._restarts, self._fruitless = 0, 0, 0
    self._silent_s, self._heard = 0.0, 0
    self._error: InputError | None = None
    self._workers = [_WorkerProcess(job)]
    self._close = weakref.finalize(self, _end, self._workers)

  def take(self, timeout_s: float) -> ProducedBatch | None:
    """Returns the next batch; None when none has come yet, also after a restart.

    Raises:
      InputError: the worker's own, or the worker was restarted in vain.
    """
    if self._error is not None:
      raise self._error
    worker = self._workers[0]
    timeout_s = max(timeout_s, 0.0)
    worker.command(self._generation, self._state)
    try:
      frame = worker.frames.get(timeout=timeout_s)
    except queue.Empty:
      self._wait(worker, timeout_s)
      return None
    if frame is None:
      self._replace("died")
      return None
    return self._made(frame)

  def reading(self) -> tuple[str, str]:
    """Returns (domain, document) of what the worker reads, as it said last."""
    return self._workers[0].reading

  def failures(self) -> Iterator[ReadFailure]:
    """Yields the failures since the last call."""
    failures = self._workers[0].failures
    while failures:
      yield failures.popleft()

  def state(self) -> Any:
    """Returns the iterator's state after the batches taken."""
    return json.loads(self._state)

  def restore(self, state: Any) -> None:
    """Continues from a state; the worker drops what it has made."""
    self._state, self._error = json.dumps(state), None
    self._generation += 1
    if self._workers[0].ended:
      self._start()

  def close(self) -> None:
    """Ends the worker."""
    self._close()

  def _made(self, frame: Frame) -> ProducedBatch | None:
    header, _ = frame
    if header["kind"] == "error":
      self._fail(header["message"])
    if header["kind"] == "ready" and header["fingerprint"] != self._job["fingerprint"]:
      self._fail(
        "the data worker finds other data than its parent did; "
        "start again with files that stay as they are"
      )
    if header["kind"] != "batch" or header["generation"] != self._generation:
      return None
    made, self._state = read_batch(frame)
    self._fruitless, self._silent_s = 0, 0.0
    return made

  def _wait(self, worker: _WorkerProcess, waited_s: float) -> None:
    """Adds up what was waited without a sign of life.

    By the waits and not by the clock: while this process was stopped, it could not hear.
    """
    self._silent_s = self._silent_s + waited_s if self._heard == worker.heard else 0.0
    self._heard = worker.heard
    if self._silent_s > (self._callbacks.stall_s if worker.heard else _START_S):
      self._replace("stalled")

  def _replace(self, what: str) -> None:
    words = self._workers[0].end()
    self._restarts += 1
    self._fruitless += 1
    self._callbacks.worker(what, self._restarts)
    if self._fruitless > _MAX_RESTARTS:
      self._fail(
        f"the data worker {what} {self._fruitless} times without a batch; its last words: "
        f"{words or 'none'}; set --config.data.worker=thread to do without it"
      )
    self._start()

  def _start(self) -> None:
    self._workers[:] = [_WorkerProcess(self._job)]
    self._silent_s, self._heard = 0.0, 0

  def _fail(self, message: str) -> None:
    self._workers[0].end()
    self._error = InputError(message)
    raise self._error


class _WorkerProcess:
  """One process, the thread that listens to it, and what it said last."""

  def __init__(self, job: dict[str, Any]):
    self.frames: queue.Queue[Frame | None] = queue.Queue(maxsize=_AHEAD)
    self.reading = ("", "starting the data worker")
    self.failures: collections.deque[ReadFailure] = collections.deque(maxlen=1000)
    self.heard = 0  # signs of life
    self.ended, self._generation = False, -1
    self._words = tempfile.TemporaryFile()  # noqa: SIM115
    # A group of its own: Ctrl-C and Ctrl-Z at a terminal are for the parent.
    self._process = subprocess.Popen(
      [sys.executable, *_COMMAND],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, process_group=0,
    )  # fmt: skip
    self._notify(job)
    self._thread = threading.Thread(target=self._hear, daemon=True, name="data worker")
    self._thread.start()

  def command(self, generation: int, state: str) -> None:
    """Tells the worker to go on from a state, once for each generation."""
    if generation != self._generation:
      self._generation = generation
      self._notify({"generation": generation, "state": json.loads(state)})

  def end(self) -> str:
    """Kills the process, whatever it is doing; returns its last words on one line."""
    if self.ended:
      return ""
    self.ended = True
    self._process.kill()
    self._process.wait()
    while self._thread.is_alive():
      while not self.frames.empty():
        self.frames.get_nowait()  # makes room: the thread may wait to put
      self._thread.join(0.02)
    for pipe in (self._process.stdin, self._process.stdout):
      with contextlib.suppress(OSError):  # what was buffered for a dead process
        pipe.close()  # type: ignore[union-attr]
    size = self._words.seek(0, os.SEEK_END)
    self._words.seek(max(0, size - 500))
    words = self._words.read().decode("utf-8", errors="replace")
    self._words.close()
    return " ".join(words.split())

  def _hear(self) -> None:
    """Takes note of signs of life and passes the rest on; None comes last. Blocks on enough."""
    pipe: Any = self._process.stdout
    with contextlib.suppress(OSError, ValueError):  # it was ended while it spoke
      while (frame := read_frame(pipe)) is not None:
        header, _ = frame
        self.heard += 1
        if header["kind"] == "alive":
          self.failures.extend(tuple(failure) for failure in header["failures"])
          self.reading = tuple(header["reading"])
        else:
          self.frames.put(frame)
    self.frames.put(None)

  def _notify(self, message: dict[str, Any]) -> None:
    pipe: Any = self._process.stdin
    with contextlib.suppress(OSError):  # it died, which the end of its frames tells
      pipe.write(json.dumps(message).encode() + b"\n")
      pipe.flush()


def _end(workers: list[_WorkerProcess]) -> None:
  for worker in workers:
    worker.end()
