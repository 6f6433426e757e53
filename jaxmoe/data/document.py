"""A document of an opened corpus: what is known of it, and how its text and ids are read."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import threading
import time
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.chat_format import ChatFormat, EncodedDocument, PlainChatFormat, writer_for
from jaxmoe.data.raw_example import Content, Source
from jaxmoe.data.tokenizers.tokenizer import Tokenizer


def content_digest(content: Content) -> bytes:
  """Returns 16 bytes that tell two contents apart, also where they are of different kinds."""
  if isinstance(content, str):
    return hashlib.blake2b(content.encode("utf-8"), digest_size=16, person=b"text").digest()
  if isinstance(content, np.ndarray):
    ids = np.asarray(content, "<i4")
    return hashlib.blake2b(ids.tobytes(), digest_size=16, person=b"ids").digest()
  line = content.line.encode("utf-8")
  return hashlib.blake2b(line, digest_size=16, person=b"messages").digest()


def without_start_id(ids: np.ndarray, scored: np.ndarray | None, start_id: int) -> EncodedDocument:
  """Returns ids and mask of a document for behind the id that starts every one.

  A chat template may write that id itself; it must not stand there twice.
  """
  if scored is not None and len(ids) and ids[0] == start_id and not scored[0]:
    return ids[1:], scored[1:]
  return ids, scored


class DocumentReader:
  """Reads and tokenizes the documents of all sources; keeps ids up to a number of bytes.

  Args:
    tokenizer: Makes the ids.
    cache_bytes: What is kept is never dropped: documents are visited in cycles, where dropping
      the oldest would always drop the next one needed.
    chat: How conversations become text.
    waits_s: Before each further try, where the system cannot read a document.

  Attributes:
    failures: (domain, document, why) of reads that are tried again; whoever looks takes them out.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    cache_bytes: int,
    chat: ChatFormat = PlainChatFormat(),  # noqa: B008
    waits_s: tuple[float, ...] = (0.1, 1.0, 5.0),
  ):
    self._tokenizer, self._chat, self._waits_s = tokenizer, chat, waits_s
    self.failures: collections.deque[tuple[str, str, str]] = collections.deque(maxlen=1000)
    self._left = cache_bytes
    self._kept: dict[tuple[str, str], EncodedDocument] = {}
    self._lock = threading.Lock()
    self._dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32

  def encoded(self, document: Document) -> EncodedDocument:
    """Returns the int32 ids of `document` and which of them are learned."""
    key = (document.source.domain, document.name)
    kept = self._kept.get(key)
    if kept is not None:
      return kept[0].astype(np.int32), kept[1]
    ids, scored = self._encode(document.content)
    small = ids.astype(self._dtype)
    size = small.nbytes + (0 if scored is None else scored.nbytes)
    with self._lock:
      if key not in self._kept and size <= self._left:
        self._left -= size
        self._kept[key] = small, scored
    return ids.astype(np.int32), scored

  def content(self, document: Document) -> Content:
    """Returns the content of `document`, read again.

    Raises:
      InputError: it is not what it was when the corpus was opened, or cannot be read at all.
    """
    for wait_s in (*self._waits_s, None):
      try:
        content = document.source.read(document.locator)
        break
      except OSError as error:  # a disk or a network may come back
        why = " ".join((error.strerror or str(error)).split())
        if wait_s is None:
          raise _lost(document, f"could not be read in {len(self._waits_s) + 1} tries ({why})",
                      "mend the disk or the network and start again") from None  # fmt: skip
        self.failures.append((document.source.domain, document.name, why))
        time.sleep(wait_s)
      except ValueError as error:
        raise _changed(document, str(error)) from None
    if content_digest(content) != document.digest:
      raise _changed(document, "other content")
    return content

  def raw(self, document: Document) -> bytes:
    """Returns the UTF-8 bytes of `document`."""
    content = document.content
    if isinstance(content, str):
      return content.encode("utf-8")
    if isinstance(content, np.ndarray):
      return self._tokenizer.decode_bytes(content)
    pieces = writer_for(content, self._chat).text(content, self._tokenizer)
    return "".join(text for text, _ in pieces).encode("utf-8")

  def _encode(self, content: Content) -> EncodedDocument:
    if isinstance(content, str):
      return self._tokenizer.encode(content), None
    if isinstance(content, np.ndarray):
      return content, None
    return writer_for(content, self._chat).encode(content, self._tokenizer)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Document:
  """One document.

  Attributes:
    name: What it is called inside its source.
    num_bytes: Its length in UTF-8 bytes.
    digest: Of its content.
    answer: Start and end, in bytes, of the part that can be scored by exact match, or None.
    unscored_bytes: Those of its bytes that are read but not learned.
    in_part: Whether some of its tokens are learned and others not.
  """

  name: str
  num_bytes: int
  digest: bytes
  answer: tuple[int, int] | None
  source: Source = dataclasses.field(repr=False)
  locator: Any = dataclasses.field(repr=False)
  reader: DocumentReader = dataclasses.field(repr=False)
  unscored_bytes: int = 0
  in_part: bool = False

  @property
  def content(self) -> Content:
    """The text, ids or messages the source has for it, read again.

    Raises:
      InputError: the content is not what it was when the corpus was opened, or cannot be read.
    """
    return self.reader.content(self)

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
    return self.reader.encoded(self)[0]

  @property
  def scored(self) -> np.ndarray | None:
    """Which ids, and after them the end of document, are learned and scored; None for all."""
    return self.reader.encoded(self)[1] if self.in_part or self.unscored_bytes else None

  @property
  def ids_and_scored(self) -> EncodedDocument:
    """Both, for the price of one."""
    return self.reader.encoded(self)

  @property
  def scored_bytes(self) -> int:
    """The UTF-8 bytes that are learned and scored."""
    return self.num_bytes - self.unscored_bytes


def _changed(document: Document, how: str) -> InputError:
  return _lost(
    document, f"changed while it was in use ({how})", "start again with files that stay as they are"
  )


def _lost(document: Document, how: str, cure: str) -> InputError:
  return InputError(f"document {document.name!r} of {document.source.domain!r} {how}; {cure}")
