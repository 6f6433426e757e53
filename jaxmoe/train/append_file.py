"""An append-only text file of whole pieces that outlives a disk which refuses them for a while.

A piece that cannot be written (a full disk, one that became read-only) is kept in memory, in order,
and written with the next one. What was torn by the attempt is cut off again, and so is what lies
behind the last whole line when the file is first written to: a machine that went down left it.
"""

from __future__ import annotations

import os
import pathlib
from typing import IO

_BLOCK = 1 << 16


class AppendFile:
  """Appends whole pieces to a file."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.pending: list[bytes] = []
    self._torn_at: int | None = None
    self._looked = False

  def append(self, piece: bytes) -> str:
    """Takes a piece, writes all that can be written, and returns '' or why something is left."""
    self.pending.append(piece)
    return self.flush()

  def flush(self) -> str:
    """Writes what is pending; returns '' or why it could not be written."""
    if not self.pending:
      return ""
    try:
      self._write(b"".join(self.pending))
    except OSError as error:
      return error.strerror or str(error)
    self.pending.clear()
    return ""

  def sync(self) -> None:
    """Returns once every piece is on the disk, also if the machine loses power.

    Raises:
      OSError: something could not be written; it stays pending.
    """
    why = self.flush()
    if why:
      raise OSError(f"{self.path}: {why}")
    if self.path.exists():
      with open(self.path, "rb") as file:
        os.fsync(file.fileno())

  def _write(self, data: bytes) -> None:
    # One write: a piece is there or not, unless the machine itself goes down.
    with open(self.path, "a+b", buffering=0) as file:
      if not self._looked:
        self._torn_at, self._looked = _end_of_lines(file), True
      if self._torn_at is not None:
        file.truncate(self._torn_at)
        self._torn_at = None
      end = os.fstat(file.fileno()).st_size
      try:
        if file.write(data) != len(data):
          raise OSError(None, "No space left on device")
      except OSError:
        self._torn_at = end
        file.truncate(end)
        self._torn_at = None
        raise


class NoFile(AppendFile):
  """Takes pieces and keeps none: for the processes of a run that write no files."""

  def append(self, piece: bytes) -> str:
    """Takes a piece."""
    return ""


def _end_of_lines(file: IO[bytes]) -> int:
  """Returns where the last whole line of a file ends."""
  end = file.seek(0, os.SEEK_END)
  while end:
    start = max(end - _BLOCK, 0)
    file.seek(start)
    newline = file.read(end - start).rfind(b"\n")
    if newline >= 0:
      return start + newline + 1
    end = start
  return 0
