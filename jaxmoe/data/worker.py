"""The data worker: a process that makes batches for its parent, started by `WorkerClient`.

It opens the corpus itself and says once a second that it is alive and what it reads. It ends when
its parent does, which closes its standard input; Ctrl-C and SIGTERM, which may reach all processes
of a run, are for the parent to act on. JAX is imported (by grain) but no backend is started.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from typing import Any, BinaryIO

from jaxmoe.core.config_io import from_plain
from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus
from jaxmoe.data.mixture import Data
from jaxmoe.data.prefetch import PrefetchThread
from jaxmoe.data.worker_protocol import batch_frame, write_frame

_BEAT_S = 1.0


class Worker:
  """Serves one job, writing frames to `pipe`."""

  def __init__(self, pipe: BinaryIO):
    self._pipe, self._lock = pipe, threading.Lock()
    self._producer: PrefetchThread | None = None
    self._doing = "opening the corpus"

  def serve(self, job: dict[str, Any], commands: queue.Queue[dict[str, Any]]) -> None:
    """Makes batches from the state of each command until the next one comes."""
    data = from_plain(Data, job["data"])
    corpus = open_corpus(data, job["cache_dir"], self._progress)
    self._producer = producer = corpus.prefetch(*job["stream"])
    batch_size, seed = job["stream"][:2]
    self.say({"kind": "ready", "fingerprint": corpus.fingerprint(batch_size, seed)})
    while True:
      command = commands.get()
      producer.restore(command["state"])
      while commands.empty():
        made = producer.take(_BEAT_S)
        if made is not None:
          header, parts = batch_frame(command["generation"], made, producer.state())
          self.say(header, *parts)

  def say(self, header: dict[str, Any], *parts: bytes) -> None:
    """Writes one frame; waits while the parent has batches enough."""
    with self._lock:
      write_frame(self._pipe, header, *parts)

  def say_alive(self) -> None:
    """Says what is being read and which reads failed."""
    producer = self._producer
    reading = ("", self._doing) if producer is None else producer.reading()
    failures = [] if producer is None else list(producer.failures())
    self.say({"kind": "alive", "reading": reading, "failures": failures})

  def beat(self) -> None:
    """Says it again and again until nobody listens."""
    try:
      while True:
        self.say_alive()
        time.sleep(_BEAT_S)
    except OSError:
      pass

  def _progress(self, line: str) -> None:
    self._doing = f"opening the corpus ({line})"


def main() -> int:
  """Runs the worker; returns its exit code."""
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  worker = Worker(os.fdopen(os.dup(1), "wb"))
  os.dup2(2, 1)  # whatever a library prints must not end up between frames
  # Not sys.stdin: Python fails at its end when a thread waits for a line of that.
  lines = open(0, "rb", closefd=False)  # noqa: SIM115
  job = lines.readline()
  if not job.endswith(b"\n"):
    return 0
  commands: queue.Queue[dict[str, Any]] = queue.Queue()
  threading.Thread(target=_listen, args=(lines, commands), daemon=True).start()
  threading.Thread(target=worker.beat, daemon=True).start()
  try:
    worker.serve(json.loads(job), commands)
  except BrokenPipeError:
    return 0  # the parent is gone
  except InputError as error:
    worker.say_alive()
    worker.say({"kind": "error", "message": str(error)})
  return 1


def _listen(lines: BinaryIO, commands: queue.Queue[dict[str, Any]]) -> None:
  """Passes commands on; ends the process, whatever it is doing, when its parent is gone."""
  for line in lines:
    if line.endswith(b"\n"):
      commands.put(json.loads(line))
  os._exit(0)


if __name__ == "__main__":
  sys.exit(main())
