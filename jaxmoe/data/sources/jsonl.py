"""Files of JSON lines, plain or gzipped: one document a line.

A line is an object with one of `text`, `tokens` and `messages`; other fields are ignored. Plain
files are read again by byte offset; a gzipped file has no random access, so its documents stay in
memory.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from jaxmoe.data.entry import INVALID_UTF8, Content, Entry, too_large, unreadable
from jaxmoe.data.sources.record import record_content, record_entry
from jaxmoe.data.sources.text import check_path, find_files


@dataclasses.dataclass(frozen=True)
class Jsonl:
  """Lines of `{"text": ...}`, `{"tokens": [...]}` or `{"messages": [{"role", "content"}, ...]}`.

  Whether a line is held out depends on its content alone, so equal documents are on one side.

  Attributes:
    path: A folder (every .jsonl and .jsonl.gz file below it), a glob, or one file.
    domain: The name the documents are trained and scored under.
  """

  path: str
  domain: str = "jsonl"

  def __post_init__(self) -> None:
    check_path(self.path, "a folder of .jsonl or .jsonl.gz files")

  def scan(self, max_bytes: int) -> Iterator[Entry]:
    """Yields every line that is not blank, file by file in the order of their paths."""
    for name, path in find_files(self.path, (".jsonl", ".jsonl.gz")):
      gzipped = path.endswith(".gz")
      try:
        with _open(path, gzipped) as file:
          for number, offset, line in _lines(file, max_bytes):
            yield _entry(path, name, number, (offset, gzipped), line, max_bytes)
      except (OSError, EOFError, zlib.error) as error:
        yield Entry(path, name, name, name, flaw=unreadable(error))

  def read(self, locator: Any) -> Content:
    """Returns the document at (path, offset, length), or the content in the list `locator`."""
    if isinstance(locator, list):
      return locator[0]
    path, offset, length = locator
    with open(path, "rb") as file:
      file.seek(offset)
      content, flaw = _parse(file.read(length))
    if content is None:
      raise ValueError(flaw)
    return content


def _open(path: str, gzipped: bool) -> BinaryIO:
  return cast(BinaryIO, gzip.open(path, "rb") if gzipped else open(path, "rb"))


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
  """Yields (line number, offset, line); None for a line over the limit, of which a part is read."""
  number, offset = 0, 0
  while line := file.readline(max_bytes + 1):
    number, start, size = number + 1, offset, len(line)
    too_long = size > max_bytes and not line.endswith(b"\n")
    while not line.endswith(b"\n") and (rest := file.readline(2**20)):
      size, line = size + len(rest), rest
    offset += size
    if too_long:
      yield number, start, None
    elif line.strip():
      yield number, start, line


def _entry(
  path: str, name: str, number: int, where: tuple[int, bool], line: bytes | None, max_bytes: int
) -> Entry:
  place, name = f"{path}:{number}", f"{name}:{number}"
  if line is None:
    return Entry(place, name, name, name, flaw=too_large(max_bytes))
  content, flaw = _parse(line)
  offset, gzipped = where
  # A list, since content that is messages is a tuple.
  locator = [content] if gzipped else (path, offset, len(line))
  return record_entry(place, name, content, flaw, locator)


def _parse(line: bytes) -> tuple[Content | None, str]:
  """Returns (content, '') or (None, flaw) of one line."""
  try:
    record = json.loads(line.decode("utf-8"))
  except UnicodeDecodeError:
    return None, INVALID_UTF8
  except (ValueError, RecursionError):
    return None, "not JSON"
  return record_content(record)
