"""The standard library of the running Python: text that is on every machine.

Three disjoint domains: `code`, its .py files outside test folders; `prose`, the help topics of
pydoc (their file is left out of `code`); `names`, the names of Unicode characters. All three differ
by Python version; the digest of the corpus tells.
"""

from __future__ import annotations

import dataclasses
import os
import sysconfig
import unicodedata
from collections.abc import Iterator
from itertools import islice
from typing import Literal

from jaxmoe.core.config_io import added
from jaxmoe.core.errors import InputError
from jaxmoe.data.raw_example import RawExample
from jaxmoe.data.sources.find_files import deduplicate
from jaxmoe.data.sources.package_split import split_key
from jaxmoe.data.sources.text_files import file_example, read_text

_NOT_CODE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TOPICS = "pydoc_data/topics.py"
_BLOCK = 256  # code points a document of names covers
_CURE = (
  "train on a folder of .txt files instead (--config=configs/quickstart.py:text=FOLDER)"
)


@dataclasses.dataclass(frozen=True)
class Stdlib:
  """One domain of the standard library.

  Attributes:
    domain: Which part of it.
    root: The folder of the sources of `code`; None for the running Python's.
    max_documents: Stop after this many documents in name order; None for all.
    split_by: What of `code` is held out together: a package folder (a top-level module by itself),
      or every file by itself, as runs begun earlier have it, which hold out near-copies of files
      that they train on and count a file as often as links lead to it.
  """

  domain: Literal["code", "prose", "names"] = "code"
  root: str | None = None
  max_documents: int | None = None
  split_by: Literal["package", "file"] = added("package", before="file")

  def __post_init__(self) -> None:
    if self.max_documents is not None and self.max_documents < 1:
      raise InputError(f"max_documents must be at least 1 or none, got {self.max_documents}")
    if self.root is not None and self.domain != "code":
      raise InputError(f"root is for the domain 'code', not {self.domain!r}; set it to none")

  def scan(self, max_bytes: int) -> Iterator[RawExample]:
    """Yields the documents of the domain in name order; empty modules are not documents."""
    if self.domain == "code":
      return islice(self._code(max_bytes), self.max_documents)
    texts = _topics() if self.domain == "prose" else _names()
    return islice(self._texts(texts), self.max_documents)

  def read(self, locator: str) -> str:
    """Returns the text of the file at path `locator`, or the locator itself, which is the text."""
    return read_text(locator, self._as_found) if self.domain == "code" else locator

  @property
  def _as_found(self) -> bool:
    return self.split_by == "file"

  def _code(self, max_bytes: int) -> Iterator[RawExample]:
    root = self.root or sysconfig.get_paths()["stdlib"]
    files = _python_files(root)
    keys = set()
    for name, path in files if self._as_found else deduplicate(files, root):
      example = file_example(path, name, max_bytes, self._as_found)
      if example.content is None or str(example.content).strip():
        key = name if self.split_by == "file" else split_key(name)
        keys.add(key)
        yield dataclasses.replace(example, split_key=key)
    if not keys:
      raise InputError(f"no .py sources under {root!r} (a zipped or stripped Python?); {_CURE}")
    if len(keys) == 1 and self.split_by == "package":
      raise InputError(f"all sources under {root!r} are one package; set split_by=file")

  def _texts(self, texts: Iterator[tuple[str, str]]) -> Iterator[RawExample]:
    for name, text in texts:
      place = f"stdlib/{self.domain}/{name}"
      yield RawExample(place, name, place, place, text, locator=text)


def _python_files(root: str) -> Iterator[tuple[str, str]]:
  """Yields (path relative to root, path), sorted, of the files outside test folders."""
  names = []
  for folder, folders, files in os.walk(root):
    folders[:] = [item for item in folders if item not in _NOT_CODE]
    relative = os.path.relpath(folder, root).replace(os.sep, "/")
    prefix = "" if relative == "." else f"{relative}/"
    names += [prefix + item for item in files if item.endswith(".py")]
  for name in sorted(names):
    if name != _TOPICS:
      yield name, os.path.join(root, name)


def _topics() -> Iterator[tuple[str, str]]:
  try:
    from pydoc_data.topics import topics
  except ImportError:
    raise InputError(f"this Python has no help topics (pydoc_data.topics); {_CURE}") from None
  yield from sorted(topics.items())


def _names() -> Iterator[tuple[str, str]]:
  """Yields (first code point, names a line each); names spelled by a rule are left out."""
  for start in range(0, 0x110000, _BLOCK):
    names = [unicodedata.name(chr(point), "") for point in range(start, start + _BLOCK)]
    pairs = zip(range(start, start + _BLOCK), names)
    chosen = [name for point, name in pairs if name and not _by_rule(point, name)]
    if chosen:
      yield f"{start:06X}", "\n".join(chosen) + "\n"


def _by_rule(point: int, name: str) -> bool:
  """Whether a name only repeats its code point, or spells a Hangul syllable."""
  return name.endswith(f"-{point:X}") or name.startswith("HANGUL SYLLABLE ")
