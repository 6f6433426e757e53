"""Files of JSON lines, plain or gzipped: one document a line. And .json files of records.

A line is an object with one of `text`, `tokens` and `messages`; other fields are ignored. Plain
files are read again by byte offset; a file without random access (gzipped, UTF-16, one JSON value
over several lines) keeps its documents in memory.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from jaxmoe.core.config_io import added
from jaxmoe.data.raw_example import INVALID_UTF8, Content, RawExample, broken_file, too_large
from jaxmoe.data.sources.encoding import HEAD, binary_format, byte_order_mark, decode
from jaxmoe.data.sources.find_files import check_path, find_files
from jaxmoe.data.sources.gzip_offset import compressed_bytes_for
from jaxmoe.data.sources.json_record import record_content, record_example
from jaxmoe.data.sources.json_values import NotJson, is_lines, is_object, json_values

SUFFIXES = (".jsonl", ".jsonl.gz")
VALUES = (".json", ".json.gz")
_UNKNOWN = "how much is cut off is not known"
_SEVERAL = "not JSON by itself; a value over several lines is read where the file is called .json"


@dataclasses.dataclass(frozen=True)
class Jsonl:
  """Lines of `{"text": ...}`, `{"tokens": [...]}` or `{"messages": [{"role", "content"}, ...]}`.

  A file called .json may also be an array of such objects, or objects over several lines. Whether a
  record is held out depends on its content alone, so equal documents are on one side.

  Attributes:
    path: A folder (every .jsonl and .jsonl.gz file below it; where it has none, every .json and
      .json.gz file), a glob, or one file.
    domain: The name the documents are trained and scored under.
    as_found: As runs begun earlier read them: a file counts as often as links lead to it, a byte
      order mark is a part of the first line, and .json files are lines, too.
  """

  path: str
  domain: str = "jsonl"
  as_found: bool = added(False, before=True)

  def __post_init__(self) -> None:
    check_path(self.path, "a folder of .jsonl or .jsonl.gz files")

  def scan(self, max_bytes: int) -> Iterator[RawExample]:
    """Yields every line that is not blank, file by file in the order of their paths."""
    instead = () if self.as_found else VALUES
    for name, path in find_files(self.path, SUFFIXES, self.as_found, instead):
      yield from _File(path, name, self.as_found).scan(max_bytes)

  def read(self, locator: Any) -> Content:
    """Returns the document at (path, offset, length), or the content in the list `locator`."""
    if isinstance(locator, list):
      return locator[0]
    path, offset, length = locator
    with open(path, "rb") as file:
      file.seek(offset)
      content, why = _parse(file.read(length))
    if content is None:
      raise ValueError(why)
    return content


class _File:
  """One file while it is scanned."""

  def __init__(self, path: str, name: str, as_found: bool):
    self.path, self.name, self.as_found = path, name, as_found
    self.gzipped = path.endswith(".gz")
    self._end = 0  # of what gave records, in bytes of what the file holds

  def scan(self, max_bytes: int) -> Iterator[RawExample]:
    """Yields its records, and where it ends early or cannot be read, an example that says so."""
    try:
      with self._open() as file:
        yield from self._entries(file, max_bytes)
    except EOFError:
      early = EOFError(f"{'ends early' if self._num_bytes else 'is empty'}; {_UNKNOWN}")
      yield broken_file(self.path, self.name, early, self._lost)
    except (OSError, zlib.error, UnicodeDecodeError, NotJson) as error:
      yield broken_file(self.path, self.name, error, self._lost)

  def _open(self) -> BinaryIO:
    if not self.gzipped:
      return open(self.path, "rb")
    if not self._num_bytes:
      raise EOFError  # module gzip takes it for a file of nothing
    return cast(BinaryIO, gzip.open(self.path, "rb"))

  def _entries(self, file: BinaryIO, max_bytes: int) -> Iterator[RawExample]:
    start = b"" if self.as_found else file.read(HEAD)
    if binary_format(start):
      raise NotJson(binary_format(start))
    encoding, skip = byte_order_mark(start)
    file.seek(0)
    if encoding != "utf-8":
      file, skip = io.BytesIO(decode(file.read()).encode("utf-8")), 0
    file.seek(skip)
    if not self.as_found and self.path.endswith(VALUES):
      first = file.readline()
      text = "" if is_object(first) else decode(first + file.read())
      if not is_object(first) and not is_lines(text):
        yield from self._values(text, skip, max_bytes)
        return
      file.seek(skip)
    in_memory = self.gzipped or encoding != "utf-8"
    for number, offset, line in _lines(file, max_bytes, skip):
      self._end = offset + len(line or b"")
      locator = None if in_memory else (self.path, offset, len(line or b""))
      yield self._entry(number, line, max_bytes, locator)

  def _values(self, text: str, skip: int, max_bytes: int) -> Iterator[RawExample]:
    number, self._end, before = 0, skip, 0
    try:
      for number, (value, start, end) in enumerate(json_values(text), 1):
        place, name = f"{self.path}:{number}", f"{self.name}:{number}"
        size = len(text[start:end].encode("utf-8"))
        found = (None, too_large(max_bytes)) if size > max_bytes else record_content(value)
        yield record_example(place, name, *found, locator=[found[0]])
        self._end, before = self._end + len(text[before:end].encode("utf-8")), end
    except NotJson:
      if number or text.lstrip().startswith("["):
        raise
    if not number and not text.lstrip().startswith("["):  # a file that is one record
      why = "not JSON" if text.strip() else "an empty document"
      yield RawExample(self.path, self.name, self.name, self.name, error=why)

  def _entry(
    self, number: int, line: bytes | None, max_bytes: int, locator: tuple[str, int, int] | None
  ) -> RawExample:
    place, name = f"{self.path}:{number}", f"{self.name}:{number}"
    if line is None:
      return RawExample(place, name, name, name, error=too_large(max_bytes))
    content, why = _parse(line)
    if not self.as_found and line.strip() in (b"{", b"["):
      why = _SEVERAL
    # A list, since content that is messages is a tuple.
    return record_example(place, name, content, why, locator or [content])

  def _lost(self) -> int:
    """Returns how many bytes of the file gave no record; what a cut took away is not known."""
    used = compressed_bytes_for(self.path, self._end) if self.gzipped else self._end
    return max(0, self._num_bytes - used)

  @property
  def _num_bytes(self) -> int:
    return os.path.getsize(self.path)


def _lines(
  file: BinaryIO, max_bytes: int, offset: int = 0
) -> Iterator[tuple[int, int, bytes | None]]:
  """Yields (line number, offset, line); None for a line over the limit, of which a part is read."""
  number = 0
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


def _parse(line: bytes) -> tuple[Content | None, str]:
  """Returns (content, '') or (None, why) of one line."""
  try:
    record = json.loads(line.decode("utf-8"))
  except UnicodeDecodeError:
    return None, INVALID_UTF8
  except (ValueError, RecursionError):
    return None, "not JSON"
  return record_content(record)
