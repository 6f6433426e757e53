"""UTF-8 bytes as ids, and one id for the end of a document: needs no training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from typing import ClassVar

import numpy as np

from jaxmoe.data.tokenizers.tokenizer import utf8

_END = b"<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Bytes as ids."""

  trains: ClassVar[bool] = False

  @property
  def vocab_size(self) -> int:
    """256 bytes and the end of a document."""
    return 257

  def build(
    self,
    texts: Iterable[str],
    digest: str,
    cache_dir: str | os.PathLike[str] | None,
    say: Callable[[str], None],
  ) -> ByteTokenizer:
    """Returns the tokenizer; nothing is trained."""
    return ByteTokenizer()


class ByteTokenizer:
  """Id b is byte b; id 256 ends a document."""

  vocab_size = 257
  start_id = eod_id = 256
  digest = hashlib.sha256(b"bytes, end of document 256").hexdigest()

  def encode(self, text: str) -> np.ndarray:
    """Returns the UTF-8 bytes of `text` as int32."""
    return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

  def encode_prompt(self, text: str) -> np.ndarray:
    """Returns the ids of a text to be continued, behind the end of the document before it."""
    return np.concatenate([[self.start_id], self.encode(text)]).astype(np.int32)

  def decode(self, ids: Iterable[int], special: bool = False) -> str:
    """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
    end = _END if special else b""
    written = b"".join(end if i == self.eod_id else bytes([i]) for i in map(int, ids))
    return written.decode("utf-8", errors="replace")

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """Returns the bytes of `ids`; the end of a document has none."""
    return bytes(int(i) for i in ids if i != self.eod_id)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes a JSON file for `load_tokenizer`."""
    with open(path, "w", encoding="utf-8") as file:
      json.dump({"kind": "bytes"}, file)
