"""SIGTERM, SIGINT and SIGHUP: a run finishes its step and saves."""

from __future__ import annotations

import os
import signal
import sys
import threading
import types

from jaxmoe.commands.process.command_line import INTERRUPTED, PREEMPTED, fail_alike, speaks, stops
from jaxmoe.commands.process.patient_output import Patient


class StopSignals:
  """Notes SIGTERM, SIGINT and SIGHUP, so that a run can finish its step and save.

  A hangup that whoever started the run has it ignore (nohup) stays ignored.

  Before the run first asks there is no step to finish, and whoever sends a second signal does not
  want to wait: then the process ends at once, and what was saved stays.
  """

  def __init__(self) -> None:
    self.received: int | None = None
    self._asked = False
    for number in stops():
      signal.signal(number, self._note)
    self._unraisable = sys.unraisablehook
    sys.unraisablehook = self._swallowed

  def __call__(self) -> bool:
    """Whether the run should stop."""
    self._asked = True
    return self.received is not None

  @property
  def exit_code(self) -> int:
    """The exit code that says why."""
    return INTERRUPTED if self.received == signal.SIGINT else PREEMPTED

  def _swallowed(self, unraisable: sys.UnraisableHookArgs) -> None:
    """Interrupts again where the garbage collector or a destructor swallowed it."""
    if unraisable.exc_type is KeyboardInterrupt:
      threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
      self._unraisable(unraisable)

  def _note(self, number: int, frame: types.FrameType | None) -> None:
    if self.received is not None:
      _write(b"\nerror: told twice to stop; what was saved stays, the same command goes on\n")
      os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)  # nothing waits for a save
    if number == signal.SIGINT and not self._asked:
      raise KeyboardInterrupt
    if not self._asked:
      fail_alike("preempted before a step was made; the same command goes on", PREEMPTED)
    self.received = number
    _write(b"\nstopping: finishing the step, then saving; a second signal stops at once\n")


def _write(line: bytes) -> None:
  """Writes to standard error; not by print, as the signal may have come in the middle of one."""
  if speaks():
    Patient(2).write(line)
