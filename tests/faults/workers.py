"""What can be done to the process that makes batches, by its parent."""

import dataclasses
import os

from jaxmoe.data import worker_client
from jaxmoe.data.corpus import Corpus
from tests.faults.numbers import swap

PIDS = []


def watch_worker(stall_s):
  """Notes the workers, keeps few batches ahead, and does not wait long for a silent worker."""

  def noting(start):
    def started(self, job):
      start(self, job)
      PIDS.append(self._process.pid)

    return started

  def hasty(real):
    def stream(self, *args, **options):
      args = [_hasty(value, stall_s) for value in args]
      return real(self, *args, **{name: _hasty(value, stall_s) for name, value in options.items()})

    return stream

  swap(worker_client, "_AHEAD", lambda _: 1)
  swap(worker_client._WorkerProcess, "__init__", noting)
  swap(Corpus, "stream", hasty)


def _hasty(value, stall_s):
  return dataclasses.replace(value, stall_s=stall_s) if hasattr(value, "stall_s") else value


def shoot_worker(number):
  """Sends the newest worker a signal; it may have ended already."""
  if PIDS:
    os.kill(PIDS[-1], number)
