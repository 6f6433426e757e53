"""Parquet files: one document a row.

A row is read again by decoding its row group, so a corpus that does not fit into the memory for ids
(`Data.cache_bytes`) is read fastest from row groups of a few MB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxmoe.core.config_io import added
from jaxmoe.data.raw_example import Content, RawExample
from jaxmoe.data.sources.arrow_columns import (
  RowLocator,
  document_fields,
  import_pyarrow,
  one_column,
  read_row,
  scan_rows,
)
from jaxmoe.data.sources.find_files import check_path, find_files

_SUFFIXES = (".parquet",)
_PIECE_BYTES = 2**22  # of rows that are decoded at a time while scanning, on average


@dataclasses.dataclass(frozen=True)
class Parquet:
  """Rows with one column of `text`, `tokens` and `messages`; what says no more is not read.

  Whether a row is held out depends on its content alone, so equal documents are on one side, and
  the same documents as .jsonl are split alike. Needs the extra `data`.

  Attributes:
    path: A folder (every .parquet file below it), a glob, or one file.
    domain: The name the documents are trained and scored under.
    as_found: As runs begun earlier read them: a file counts as often as links lead to it.
  """

  path: str
  domain: str = "parquet"
  as_found: bool = added(False, before=True)

  def __post_init__(self) -> None:
    check_path(self.path, "a folder of .parquet files")

  def scan(self, max_bytes: int) -> Iterator[RawExample]:
    """Yields every row, file by file in the order of their paths."""
    return scan_rows(find_files(self.path, _SUFFIXES, self.as_found), ParquetReader, max_bytes)

  def read(self, locator: RowLocator) -> Content:
    """Returns the document in a row; a few row groups stay in memory."""
    return read_row(locator)


class ParquetReader:
  """One parquet file; its metadata is kept, the file is not kept open."""

  def __init__(self, path: str):
    self.path, self.share = path, 0.0
    with self._open(None) as file:
      self._metadata = file.metadata
      self.fields = document_fields(file.schema_arrow.names)

  def pieces(self) -> Iterator[tuple[int, int, Any]]:
    """Yields the rows of one row group after the other."""
    num_rows = 0
    with self._open(self._metadata) as file:
      for group in range(self._metadata.num_row_groups):
        size, first = self._rows_of_a_piece(group), 0
        options = {"columns": self.fields, "use_threads": False}
        for batch in file.iter_batches(size, row_groups=[group], **options):
          yield group, first, one_column(batch, self.fields)
          first += batch.num_rows
          num_rows += batch.num_rows
          self.share = num_rows / max(self._metadata.num_rows, num_rows)

  def load(self, group: int) -> Any:
    """Returns the column of a row group."""
    with self._open(self._metadata) as file:
      table = file.read_row_group(group, columns=self.fields, use_threads=False)
      return one_column(table, self.fields)

  def _open(self, metadata: Any) -> Any:
    # Without a buffer the bytes of a whole column chunk are read before the first row.
    return import_pyarrow().parquet.ParquetFile(
      self.path, metadata=metadata, buffer_size=2**20, pre_buffer=False
    )

  def _rows_of_a_piece(self, group: int) -> int:
    of = self._metadata.row_group(group)
    # Of all columns: asking a damaged file for the size of one can abort the process.
    return max(1, min(4096, _PIECE_BYTES * of.num_rows // max(of.total_byte_size, 1)))
