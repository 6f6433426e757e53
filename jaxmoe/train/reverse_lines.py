"""JSON lines read from the end of a file: a long run's metrics.jsonl has gigabytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

_BLOCK = 1 << 16


def lines_back(file: IO[bytes]) -> Iterator[bytes]:
  """Yields the whole lines of a file that was opened for bytes, the last one first.

  What stands behind the last line break was torn, or is being written, and is left out. A file that
  is cut off meanwhile ends the lines.
  """
  start, block, rest, torn = file.seek(0, 2), _BLOCK, b"", True
  while start > 0:
    size = min(block, start)
    start -= size
    file.seek(start)
    piece = file.read(size)
    if len(piece) < size:
      return
    lines = (piece + rest).split(b"\n")
    if torn and len(lines) > 1:
      lines.pop()
      torn = False
    rest = lines[0]
    yield from reversed(lines[1:])
    block = _BLOCK if len(lines) > 1 else 2 * block  # or a long line would be copied often
  if not torn:
    yield rest


def parse(line: bytes) -> dict[str, Any] | None:
  """Returns the object of a line, None for anything else."""
  try:
    value = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) else None


def clock_of(line: bytes) -> dict[str, Any] | None:
  """Returns the object of a line with nothing but its `time`, without reading the rest of it."""
  at = line.rfind(b'"time":')
  return parse(b"{" + line[at:]) or parse(line) if at >= 0 else None
