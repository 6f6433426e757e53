"""Documents in a column of Arrow rows: what parquet and Arrow files share.

A file is a sequence of groups of rows (row groups, record batches). It is scanned piece by piece; a
row is read again by loading its group, of which the last ones used stay in memory. Strings are
taken as bytes and decoded row by row, so that one bad row does not spoil its neighbours, and what
was read is validated before it is touched, since a damaged file may point anywhere.
"""

from __future__ import annotations

import collections
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from jaxmoe.core.errors import InputError
from jaxmoe.data.raw_example import Content, RawExample, broken_file, too_large
from jaxmoe.data.sources.json_record import FIELDS, fields_of, record_content, record_example

_KEPT_BYTES = 2**26  # groups kept of one source; one group is kept whatever its size
_STEP = 256  # rows turned into Python values at a time
RowLocator = tuple["GroupCache", "RowReader", int, int]
"""The locator of a row: what keeps its group, its file, group and row in the group."""


class RowReader(Protocol):
  """One file; its constructor reads what is needed to find its groups.

  Attributes:
    path: Where it lies.
    fields: The columns that documents are read from; several are one of structs.
    share: How much of the file is behind what `pieces` has given.
  """

  path: str
  fields: list[str]
  share: float

  def pieces(self) -> Iterator[tuple[int, int, Any]]:
    """Yields (group, row in it, column of the rows from there on), bounded in size, in order."""

  def load(self, group: int) -> Any:
    """Returns the column of a whole group."""


class GroupCache:
  """The columns of the groups last used, up to a number of bytes."""

  def __init__(self, max_bytes: int = _KEPT_BYTES):
    self._max_bytes, self._columns = max_bytes, collections.OrderedDict[Any, Any]()
    self._lock = threading.Lock()

  def column(self, rows: RowReader, group: int) -> Any:
    """Returns the checked column of a group."""
    key = rows.path, group
    with self._lock:
      if key in self._columns:
        self._columns.move_to_end(key)
        return self._columns[key]
    column = _checked(rows.load(group))
    with self._lock:
      self._columns[key] = column
      while len(self._columns) > 1 and self._num_bytes() > self._max_bytes:
        self._columns.popitem(last=False)
    return column

  def _num_bytes(self) -> int:
    return sum(column.nbytes for column in self._columns.values())


def import_pyarrow() -> Any:
  """Returns the module pyarrow.

  Raises:
    InputError: it is not installed.
  """
  try:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet
  except ImportError:
    raise InputError(
      "parquet and arrow files need pyarrow; install it with: pip install 'jaxmoe[data]'"
    ) from None
  return pyarrow


def document_fields(names: list[str]) -> list[str]:
  """Returns the one column that holds documents, and those that say more of them.

  Raises:
    ValueError: there is none, or several.
  """
  fields = fields_of(names)
  if not fields:
    shown = ", ".join(map(repr, names[:8]))
    raise ValueError(f"needs one column of {', '.join(FIELDS)}; it has {shown or 'none'}")
  return fields


def one_column(rows: Any, fields: list[str]) -> Any:
  """Returns the columns of a table or record batch as one, of structs where there are several."""
  return rows.column(fields[0]) if len(fields) == 1 else rows.select(fields).to_struct_array()


def scan_rows(
  files: list[tuple[str, str]], open_rows: Callable[[str], RowReader], max_bytes: int
) -> Iterator[RawExample]:
  """Yields every row of the files as an example, and one for a file that is damaged."""
  damage = (OSError, ValueError, MemoryError, OverflowError, import_pyarrow().ArrowException)
  kept = GroupCache()
  for name, path in files:
    number, rows = 0, None
    try:
      rows = open_rows(path)
      for group, first, column in rows.pieces():
        for row, (content, why) in enumerate(_contents(column, rows.fields, max_bytes), first):
          number += 1
          locator: RowLocator = kept, rows, group, row
          yield record_example(f"{path}:{number}", f"{name}:{number}", content, why, locator)
    except damage as error:
      share = 0.0 if rows is None else rows.share
      yield broken_file(path, name, error, functools.partial(_rest, path, share))


def _rest(path: str, share: float) -> int:
  return round((1 - share) * os.path.getsize(path))


def read_row(locator: RowLocator) -> Content:
  """Returns the content of a row.

  Raises:
    ValueError: there is no such row any more, or nothing that can be used in it.
  """
  kept, rows, group, row = locator
  try:
    column = kept.column(rows, group)
    content, why = record_content(_record(_value(column[row]), rows.fields))
  except (import_pyarrow().ArrowException, IndexError, EOFError) as error:
    raise ValueError(str(error)) from None
  except OSError as error:
    if error.errno is not None:
      raise
    raise ValueError(str(error)) from None  # not the system's: what is read makes no sense
  if content is None:
    raise ValueError(why)
  return content


def _contents(
  column: Any, fields: list[str], max_bytes: int
) -> Iterator[tuple[Content | None, str]]:
  column = _checked(column)
  for start in range(0, len(column), _STEP):
    for value in _values(column[start : start + _STEP]):
      if _size(value) > max_bytes:
        yield None, too_large(max_bytes)
      else:
        yield record_content(_record(value, fields))


def _record(value: Any, fields: list[str]) -> Any:
  """Returns a record without what is null, which a column has for what is not there."""
  return _there(value if len(fields) > 1 else {fields[0]: value})


def _there(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _there(item) for name, item in value.items() if item is not None}
  return [_there(item) for item in value] if isinstance(value, list) else value


def _values(column: Any) -> list[Any]:
  """Returns Python values; lists of whole numbers as NumPy arrays."""
  is_ids = _is_ids(column.type)
  return [_value(scalar) for scalar in column] if is_ids else column.to_pylist()


def _value(scalar: Any) -> Any:
  if _is_ids(scalar.type) and scalar.is_valid and not scalar.values.null_count:
    return scalar.values.to_numpy(zero_copy_only=False)
  return scalar.as_py()


def _is_ids(kind: Any) -> bool:
  return _is_list(kind) and import_pyarrow().types.is_integer(kind.value_type)


def _is_list(kind: Any) -> bool:
  types = import_pyarrow().types
  return types.is_list(kind) or types.is_large_list(kind)


def _size(value: Any) -> int:
  """Returns about how many bytes a value has; of messages, those of their strings."""
  if isinstance(value, list):
    return sum(map(_size, value))
  if isinstance(value, dict):
    return sum(map(_size, value.values()))
  return getattr(value, "nbytes", 0) or (len(value) if isinstance(value, (bytes, str)) else 0)


def _checked(column: Any) -> Any:
  """Returns an array, or chunks of one, validated, with strings as bytes.

  Raises:
    ValueError: it is damaged.
  """
  chunks = column.chunks if isinstance(column, import_pyarrow().ChunkedArray) else [column]
  checked = []
  for chunk in chunks:
    chunk = _decoded(chunk)
    chunk = chunk.view(_bytes_for_strings(chunk.type))
    chunk.validate(full=True)
    checked.append(chunk)
  return checked[0] if len(checked) == 1 else import_pyarrow().chunked_array(checked)


def _decoded(chunk: Any) -> Any:
  """Returns an array without dictionaries, its own or of a struct's columns."""
  pa = import_pyarrow()
  if pa.types.is_dictionary(chunk.type):
    chunk.validate(full=True)
    return chunk.dictionary_decode()
  if pa.types.is_struct(chunk.type) and any(pa.types.is_dictionary(f.type) for f in chunk.type):
    chunk.validate(full=True)
    columns = [_decoded(column) for column in chunk.flatten()]
    return pa.StructArray.from_arrays(columns, [field.name for field in chunk.type])
  return chunk


def _bytes_for_strings(kind: Any) -> Any:
  """Returns the type with bytes where `kind` has strings; the memory of both is the same."""
  pa = import_pyarrow()
  plain = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
  if kind in plain:
    return plain[kind]
  if pa.types.is_struct(kind):
    return pa.struct([field.with_type(_bytes_for_strings(field.type)) for field in kind])
  if _is_list(kind):
    inner = kind.value_field.with_type(_bytes_for_strings(kind.value_type))
    return pa.large_list(inner) if pa.types.is_large_list(kind) else pa.list_(inner)
  return kind
