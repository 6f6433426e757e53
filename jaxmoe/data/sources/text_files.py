"""A folder or a glob of .txt files: one document a file."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from collections.abc import Iterator

from jaxmoe.core.config_io import added
from jaxmoe.data.raw_example import INVALID_UTF8, RawExample, too_large, unreadable
from jaxmoe.data.sources.encoding import decode
from jaxmoe.data.sources.find_files import check_path, find_files


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """Text files, UTF-8 or what their byte order mark says.

  Attributes:
    path: A folder (every .txt file below it), a glob (`**` crosses folders), or one file.
    domain: The name the documents are trained and scored under.
    as_found: As runs begun earlier read them: a file counts as often as links lead to it, and a
      byte order mark is text.
  """

  path: str
  domain: str = "text"
  as_found: bool = added(False, before=True)

  def __post_init__(self) -> None:
    check_path(self.path, "a folder of .txt files")

  def scan(self, max_bytes: int) -> Iterator[RawExample]:
    """Yields every file in the order of its path below the folder."""
    for name, path in find_files(self.path, (".txt",), self.as_found):
      yield file_example(path, name, max_bytes, self.as_found)

  def read(self, locator: str) -> str:
    """Returns the text of the file at path `locator`, newlines as they are."""
    return read_text(locator, self.as_found)


def read_text(path: str, as_found: bool = False) -> str:
  """Returns the text of a file, newlines as they are.

  Raises:
    UnicodeDecodeError: its reason is what the file is instead.
    OSError: it cannot be read, or is a pipe or a device, which might never end or never begin.
  """
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise OSError(errno.EINVAL, "not a regular file", path)
  with open(path, "rb") as file:
    raw = file.read()
  return raw.decode("utf-8") if as_found else decode(raw)


def file_example(path: str, name: str, max_bytes: int, as_found: bool = False) -> RawExample:
  """Returns the example of a file that is one document."""
  unit = os.path.realpath(path)
  content, why = None, ""
  try:
    if os.path.getsize(path) > max_bytes:
      why = too_large(max_bytes)
    else:
      content = read_text(path, as_found)
  except UnicodeDecodeError as error:
    why = INVALID_UTF8 if as_found else error.reason
  except OSError as error:
    why = unreadable(error)
  return RawExample(path, name, name, unit, content, why, path)
