"""What can be done to the process that makes batches, by its parent."""

import dataclasses
import os

from jaxmoe.data import remote
from jaxmoe.train import session

PIDS = []


def watch_worker(stall_s):
  """Notes the workers, keeps few batches ahead, and does not wait long for a silent worker."""
  remote._AHEAD = 1
  start = remote._Worker.__init__

  def started(self, job):
    start(self, job)
    PIDS.append(self._process.pid)

  remote._Worker.__init__ = started
  real = session.Corpus.stream

  def stream(self, *args, **options):
    args = [_hasty(value, stall_s) for value in args]
    return real(self, *args, **{name: _hasty(value, stall_s) for name, value in options.items()})

  session.Corpus.stream = stream


def _hasty(value, stall_s):
  return dataclasses.replace(value, stall_s=stall_s) if hasattr(value, "stall_s") else value


def shoot_worker(number):
  """Sends the newest worker a signal; it may have ended already."""
  if PIDS:
    os.kill(PIDS[-1], number)
