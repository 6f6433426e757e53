"""Any files, to be scored: records where they are, and every other file that holds text.

A folder may hold files of all kinds; each kind is a domain. What holds no text is left out by name.
"""

from __future__ import annotations

import codecs
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.data.raw_example import Content, RawExample, Source
from jaxmoe.data.sources.auto import SourceClass, source_class_of
from jaxmoe.data.sources.encoding import HEAD, binary_format, byte_order_mark
from jaxmoe.data.sources.find_files import find_files
from jaxmoe.data.sources.jsonl import VALUES
from jaxmoe.data.sources.text_files import TextFiles

TEXT = ".txt"  # called text, it is a bad record where it is none
_PIECE = 2**20


@dataclasses.dataclass(frozen=True)
class FileGroup:
  """Files of one kind; each is a source by itself.

  Attributes:
    files: (name, path) of each.
    kind: The class of its source.
  """

  files: tuple[tuple[str, str], ...]
  kind: SourceClass

  @property
  def domain(self) -> str:
    """The name of the kind."""
    return self.kind(self.files[0][1]).domain

  def scan(self, max_bytes: int) -> Iterator[RawExample]:
    """Yields the examples of every file, called by the name of the file."""
    for name, path in self.files:
      source = self.kind(path)
      for example in source.scan(max_bytes):
        number = example.name.removeprefix(os.path.basename(path))
        locator = (source, example.locator)
        yield dataclasses.replace(example, name=name + number, locator=locator)

  def read(self, locator: tuple[Source, Any]) -> Content:
    """Returns the content of the example with this locator."""
    source, inner = locator
    return source.read(inner)


def sources_of(path: str) -> tuple[list[FileGroup], list[str]]:
  """Returns a source for each kind of file at `path`, and the names of files without text.

  .json files are records where there is nothing else, and text beside other files.

  Raises:
    InputError: no file there holds text.
  """
  files = find_files(path, ("",))
  records = all(name.endswith(VALUES) for name, _ in files)
  kinds: dict[SourceClass, list[tuple[str, str]]] = {}
  without = []
  for name, item in files:
    kind = TextFiles if name.endswith(VALUES) and not records else source_class_of(name)
    if kind is TextFiles and not (name.endswith(TEXT) or holds_text(item)):
      without.append(name)
    else:
      kinds.setdefault(kind, []).append((name, item))
  if not kinds:
    raise InputError(f"no file at {path!r} holds text; name others")
  return [FileGroup(tuple(found), kind) for kind, found in kinds.items()], without


def holds_text(path: str) -> bool:
  """Whether a file is text that is not blank; one that cannot be read is not found to be none."""
  try:
    with open(path, "rb") as file:
      head = file.read(HEAD)
      encoding, size = byte_order_mark(head)
      if binary_format(head):
        return False
      file.seek(size)
      return _is_text(iter(lambda: file.read(_PIECE), b""), encoding)
  except OSError:
    return True


def _is_text(pieces: Iterator[bytes], encoding: str) -> bool:
  decoder, blank = codecs.getincrementaldecoder(encoding)(), True
  try:
    for piece in pieces:
      text = decoder.decode(piece)
      blank = blank and not text.strip()
      if "\0" in text:
        return False
    return not (decoder.decode(b"", final=True).strip() or blank)
  except UnicodeDecodeError:
    return False
