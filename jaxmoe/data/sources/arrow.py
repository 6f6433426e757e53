"""Arrow IPC files and streams (.arrow, .feather): one document a row.

A file ends with a table of its record batches; a stream has none, so the places of its batches are
noted while it is scanned. Files are read, not mapped into memory: a mapped file that is cut short
kills the process.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from jaxmoe.core.config_io import added
from jaxmoe.data.raw_example import Content, RawExample
from jaxmoe.data.sources.arrow_columns import (
  RowLocator,
  RowReader,
  document_fields,
  import_pyarrow,
  one_column,
  read_row,
  scan_rows,
)
from jaxmoe.data.sources.find_files import check_path, find_files

_SUFFIXES = (".arrow", ".feather")


@dataclasses.dataclass(frozen=True)
class Arrow:
  """Rows with one column of `text`, `tokens` and `messages`.

  Whether a row is held out depends on its content alone, so equal documents are on one side, and
  the same documents as .jsonl are split alike. Needs the extra `data`.

  Attributes:
    path: A folder (every .arrow and .feather file below it), a glob, or one file.
    domain: The name the documents are trained and scored under.
    as_found: As runs begun earlier read them: a file counts as often as links lead to it.
  """

  path: str
  domain: str = "arrow"
  as_found: bool = added(False, before=True)

  def __post_init__(self) -> None:
    check_path(self.path, "a folder of .arrow or .feather files")

  def scan(self, max_bytes: int) -> Iterator[RawExample]:
    """Yields every row, file by file in the order of their paths."""
    return scan_rows(find_files(self.path, _SUFFIXES, self.as_found), _open_rows, max_bytes)

  def read(self, locator: RowLocator) -> Content:
    """Returns the document in a row; a few record batches stay in memory."""
    return read_row(locator)


class ArrowFileReader:
  """One file of the IPC file format; a group is a record batch, by its number."""

  def __init__(self, path: str):
    self.path, self.share = path, 0.0
    with import_pyarrow().OSFile(path) as file, import_pyarrow().ipc.open_file(file) as reader:
      self.fields = document_fields(reader.schema.names)
      self._places = [reader.schema.names.index(name) for name in self.fields]
      self._num_groups = reader.num_record_batches

  def pieces(self) -> Iterator[tuple[int, int, Any]]:
    """Yields one record batch after the other."""
    for group in range(self._num_groups):
      yield group, 0, self.load(group)
      self.share = (group + 1) / self._num_groups

  def load(self, group: int) -> Any:
    """Returns the column of a record batch; other columns are not read."""
    ipc = import_pyarrow().ipc
    options = ipc.IpcReadOptions(use_threads=False, included_fields=self._places)
    with import_pyarrow().OSFile(self.path) as file, ipc.open_file(file, options=options) as reader:
      return one_column(reader.get_batch(group), self.fields)


class ArrowStreamReader:
  """One file of the IPC stream format; a group is a record batch, by its place in the file."""

  def __init__(self, path: str):
    self.path, self.share = path, 0.0
    with import_pyarrow().OSFile(path) as file, import_pyarrow().ipc.open_stream(file) as reader:
      self._schema = reader.schema
    if "dictionary<" in str(self._schema):
      raise ValueError("a stream with dictionaries has no random access; write it as a file")
    self.fields = document_fields(self._schema.names)

  def pieces(self) -> Iterator[tuple[int, int, Any]]:
    """Yields one record batch after the other."""
    with (
      import_pyarrow().OSFile(self.path) as file,
      import_pyarrow().ipc.open_stream(file) as reader,
    ):
      while True:
        offset = file.tell()
        try:
          batch = reader.read_next_batch()
        except StopIteration:
          return
        yield offset, 0, one_column(batch, self.fields)
        self.share = file.tell() / os.path.getsize(self.path)

  def load(self, group: int) -> Any:
    """Returns the column of the record batch at the byte `group`."""
    with import_pyarrow().OSFile(self.path) as file:
      file.seek(group)
      message = import_pyarrow().ipc.read_message(file)
      batch = import_pyarrow().ipc.read_record_batch(message, self._schema)
      return one_column(batch, self.fields)


def _open_rows(path: str) -> RowReader:
  with open(path, "rb") as file:
    magic = file.read(6)
  if magic[:4] == b"FEA1":
    raise ValueError("feather version 1; write it again with version 2")
  return ArrowFileReader(path) if magic == b"ARROW1" else ArrowStreamReader(path)
