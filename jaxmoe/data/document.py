"""A document of an opened corpus: what is known of it, and how its text and ids are read."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.entry import Content, Source
from jaxmoe.data.tokenizers.tokenizer import Tokenizer


def content_digest(content: Content) -> bytes:
  """Returns 16 bytes that tell two contents apart; text and ids never agree."""
  if isinstance(content, str):
    return hashlib.blake2b(content.encode("utf-8"), digest_size=16, person=b"text").digest()
  ids = np.asarray(content, "<i4")
  return hashlib.blake2b(ids.tobytes(), digest_size=16, person=b"ids").digest()


class Reader:
  """Reads and tokenizes the documents of all sources; keeps ids up to a number of bytes.

  Args:
    tokenizer: Makes the ids.
    cache_bytes: What is kept is never dropped: documents are visited in cycles, where dropping
      the oldest would always drop the next one needed.
  """

  def __init__(self, tokenizer: Tokenizer, cache_bytes: int):
    self._tokenizer = tokenizer
    self._left = cache_bytes
    self._kept: dict[tuple[str, str], np.ndarray] = {}
    self._lock = threading.Lock()
    self._dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32

  def ids(self, document: Document) -> np.ndarray:
    """Returns the int32 ids of `document`."""
    key = (document.source.domain, document.name)
    kept = self._kept.get(key)
    if kept is not None:
      return kept.astype(np.int32)
    content = document.content
    ids = self._tokenizer.encode(content) if isinstance(content, str) else content
    small = ids.astype(self._dtype)
    with self._lock:
      if key not in self._kept and small.nbytes <= self._left:
        self._left -= small.nbytes
        self._kept[key] = small
    return ids.astype(np.int32)

  def raw(self, document: Document) -> bytes:
    """Returns the UTF-8 bytes of `document`."""
    content = document.content
    if isinstance(content, str):
      return content.encode("utf-8")
    return self._tokenizer.decode_bytes(content)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Document:
  """One document.

  Attributes:
    name: What it is called inside its source.
    num_bytes: Its length in UTF-8 bytes.
    digest: Of its content.
    answer: Start and end, in bytes, of the part that can be scored by exact match, or None.
  """

  name: str
  num_bytes: int
  digest: bytes
  answer: tuple[int, int] | None
  source: Source = dataclasses.field(repr=False)
  locator: Any = dataclasses.field(repr=False)
  reader: Reader = dataclasses.field(repr=False)

  @property
  def content(self) -> Content:
    """The text or the ids the source has for it, read again.

    Raises:
      InputError: the content is not what it was when the corpus was opened.
    """
    try:
      content = self.source.read(self.locator)
    except (OSError, ValueError) as error:
      raise self._changed(str(error)) from None
    if content_digest(content) != self.digest:
      raise self._changed("other content")
    return content

  @property
  def text(self) -> str:
    """The text; of a document given as ids, the text they decode to."""
    return self.reader.raw(self).decode("utf-8", errors="replace")

  @property
  def raw(self) -> bytes:
    """The UTF-8 bytes, `num_bytes` of them."""
    return self.reader.raw(self)

  @property
  def ids(self) -> np.ndarray:
    """The int32 ids, without an end of document."""
    return self.reader.ids(self)

  def _changed(self, how: str) -> InputError:
    return InputError(
      f"document {self.name!r} of {self.source.domain!r} changed while it was in use ({how}); "
      "start again with files that stay as they are"
    )
