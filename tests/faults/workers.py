"""What can be done to the process that makes batches, by its parent."""

import os

from jaxmoe.data import worker_client
from jaxmoe.data.loader_callbacks import LoaderCallbacks
from tests.faults.numbers import swap

PIDS = []


def watch_worker(stall_s):
  """Notes the workers, keeps few batches ahead, and does not wait long for a silent worker."""

  def noting(start):
    def started(self, job):
      start(self, job)
      PIDS.append(self._process.pid)

    return started

  swap(worker_client, "_AHEAD", lambda _: 1)
  swap(worker_client._WorkerProcess, "__init__", noting)
  swap(LoaderCallbacks, "stall_s", lambda _: stall_s)


def shoot_worker(number):
  """Sends the newest worker a signal; it may have ended already."""
  if PIDS:
    os.kill(PIDS[-1], number)
