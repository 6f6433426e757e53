"""The source for a path whose files tell by their suffixes (auto) what they hold."""

from __future__ import annotations

from jaxmoe.core.errors import InputError
from jaxmoe.data.raw_example import Source
from jaxmoe.data.sources.arrow import Arrow
from jaxmoe.data.sources.find_files import find_files
from jaxmoe.data.sources.jsonl import VALUES, Jsonl
from jaxmoe.data.sources.parquet import Parquet
from jaxmoe.data.sources.text_files import TextFiles

SourceClass = type[TextFiles] | type[Jsonl] | type[Parquet] | type[Arrow]
SUFFIXES: dict[str, SourceClass] = {
  ".txt": TextFiles,
  ".jsonl": Jsonl,
  ".jsonl.gz": Jsonl,
  ".parquet": Parquet,
  ".arrow": Arrow,
  ".feather": Arrow,
}


def source_at(path: str) -> Source:
  """Returns the source of the files at `path`: a folder, a glob or one file.

  A file with another suffix is text if it is named outright or by a glob; .json files are records
  where they are, and in a folder that has no other.

  Raises:
    InputError: nothing is there, or files of two kinds.
  """
  kinds = {
    source_class_of(name): name for name, _ in find_files(path, tuple(SUFFIXES), instead=VALUES)
  }
  if len(kinds) > 1:
    shown = " and ".join(sorted(kinds.values())[:2])
    raise InputError(
      f"{path!r} holds files of several kinds, such as {shown}; give each kind a folder"
    )
  (kind,) = kinds
  return kind(path)


def source_class_of(name: str) -> SourceClass:
  """Returns the source of a file that is named outright, by its suffix; text by default."""
  if name.endswith(VALUES):
    return Jsonl
  fits = (kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix))
  return next(fits, TextFiles)
