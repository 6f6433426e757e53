"""Output that nobody reads: it is dropped, and ends nothing.

A reader may be gone (`| head -8`, a terminal that was closed), may not read any more (a pager that
waits, Ctrl-S), and a file may lie on a full disk. A filter ends then; a run, or what looks after
one, goes on. What is worth keeping is in the files of the run.
"""

from __future__ import annotations

import io
import select
import sys
from typing import Any, TextIO

WAIT_S = 5.0
"""How long a reader that does not read is waited for, once."""

_PIECE_BYTES = select.PIPE_BUF  # a pipe that is ready takes so many without waiting


class Patient(io.FileIO):
  """A descriptor that takes all that is written to it, whether somebody reads it or not.

  Attributes:
    lost: Why some of it was dropped; '' if none was.
  """

  def __init__(self, descriptor: int, wait_s: float = WAIT_S):
    super().__init__(descriptor, "w", closefd=False)
    self.lost = ""
    self._wait_s = wait_s
    self._poll = select.poll()
    self._poll.register(descriptor, select.POLLOUT)

  def write(self, data: Any) -> int:
    """Returns how many bytes were taken: written or dropped."""
    try:
      # Who has not read for so long is not waited for again until he does.
      ready = self._poll.poll(0 if self.lost else self._wait_s * 1000)
      written = super().write(memoryview(data)[:_PIECE_BYTES]) if ready else None
    except OSError as error:
      self.lost = error.strerror or str(error)
      return len(data)
    if written is None:
      self.lost = "nobody read it"
      return len(data)
    return written


def outlive_readers() -> None:
  """Makes standard output and error of this process patient, where they are real ones."""
  sys.stdout, sys.stderr = _patient(sys.stdout), _patient(sys.stderr)


def patient(descriptor: int, encoding: str = "utf-8", errors: str | None = "replace") -> TextIO:
  """Returns a text stream to a descriptor, by lines, that never raises."""
  raw = io.BufferedWriter(Patient(descriptor))
  return io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=True)


def lost() -> str:
  """Returns why some of the output of this process was dropped, '' if none was known to be."""
  raws = [getattr(getattr(each, "buffer", None), "raw", None) for each in (sys.stdout, sys.stderr)]
  return next((raw.lost for raw in raws if isinstance(raw, Patient) and raw.lost), "")


def _patient(stream: TextIO) -> TextIO:
  try:
    descriptor = stream.fileno()
  except (OSError, ValueError):  # none of the system's, as in tests
    return stream
  stream.flush()
  return patient(descriptor, stream.encoding, stream.errors)
