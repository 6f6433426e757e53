"""A folder or a glob of .txt files: one document a file."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterator

from jaxmoe.core.errors import InputError
from jaxmoe.data.entry import INVALID_UTF8, Entry, too_large, unreadable


@dataclasses.dataclass(frozen=True)
class Text:
  """Text files.

  Attributes:
    path: A folder (every .txt file below it), a glob (`**` crosses folders), or one file.
    domain: The name the documents are trained and scored under.
  """

  path: str
  domain: str = "text"

  def __post_init__(self) -> None:
    check_path(self.path, "a folder of .txt files")

  def scan(self, max_bytes: int) -> Iterator[Entry]:
    """Yields every file in the order of its path below the folder."""
    for name, path in find_files(self.path, (".txt",)):
      yield file_entry(path, name, max_bytes)

  def read(self, locator: str) -> str:
    """Returns the text of the file at path `locator`, newlines as they are."""
    return read_text(locator)


def check_path(path: str, what: str) -> None:
  """Raises InputError for an empty path; whether it exists is seen when the corpus is opened."""
  if not path:
    raise InputError(f"path is empty; set it to {what}")


def find_files(path: str, suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
  """Returns sorted (path relative to the folder, path) pairs of the files `path` stands for.

  A glob counts from its longest leading folder without a wildcard. A file named outright, or by a
  glob, may have any suffix; in a folder only `suffixes` count.

  Raises:
    InputError: nothing is there.
  """
  if os.path.isfile(path):
    return [(os.path.basename(path), path)]
  if os.path.isdir(path):
    root, found = path, glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True)
    found = [item for item in found if item.endswith(suffixes)]
  else:
    root, found = _fixed_folder(path), glob.glob(path, recursive=True)
  files = [item for item in found if os.path.isfile(item)]
  if not files:
    kinds = " or ".join(suffixes)
    raise InputError(f"no {kinds} file at {path!r}; set path to a file, a folder or a glob of them")
  return sorted((os.path.relpath(item, root).replace(os.sep, "/"), item) for item in files)


def _fixed_folder(pattern: str) -> str:
  """Returns the longest leading folder of `pattern` without a wildcard."""
  folder = pattern
  while glob.has_magic(folder):
    folder = os.path.dirname(folder)
  return folder or "."


def read_text(path: str) -> str:
  """Returns the text of a UTF-8 file, newlines as they are."""
  with open(path, "rb") as file:
    return file.read().decode("utf-8")


def file_entry(path: str, name: str, max_bytes: int) -> Entry:
  """Returns the entry of a file that is one document."""
  unit = os.path.realpath(path)
  content, flaw = None, ""
  try:
    if os.path.getsize(path) > max_bytes:
      flaw = too_large(max_bytes)
    else:
      content = read_text(path)
  except UnicodeDecodeError:
    flaw = INVALID_UTF8
  except OSError as error:
    flaw = unreadable(error)
  return Entry(path, name, name, unit, content, flaw, path)
