"""A tokenizer of the `tokenizers` library behind our interface."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from jaxmoe.core.errors import InputError
from jaxmoe.data.tokenizers.tokenizer import utf8


class SubwordTokenizer:
  """Subwords: trained here, or read from a tokenizer.json.

  Args:
    text: The content of a tokenizer.json.
    vocab_size: Every id is below it; ids the file does not use are allowed at the end.
    eod_id: The id that ends a document.
    start_id: The id that starts one; None for that of the end.
    made_elsewhere: Whether a prompt gets what the tokenizer.json itself adds to a text, as it did
      where the model was made; else the id that starts a document.
  """

  def __init__(
    self, text: str, vocab_size: int, eod_id: int, start_id: int | None = None,
    made_elsewhere: bool = False,
  ):
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
      raise InputError(f"not a tokenizer.json of the tokenizers library: {error}") from None
    # Without this, text that spells a special token would become that token's id.
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    ids = self._tokenizer.get_vocab(with_added_tokens=True)
    top = max(ids.values(), default=-1)
    if top >= vocab_size or not 0 <= eod_id < vocab_size:
      raise InputError(
        f"vocab_size {vocab_size} must be above every id: the tokenizer has {top}, the end of a "
        f"document {eod_id}; set it to {max(top, eod_id) + 1} or more"
      )
    self.vocab_size, self.eod_id = vocab_size, eod_id
    self.start_id = eod_id if start_id is None else start_id
    self._made_elsewhere = made_elsewhere
    self._plain: dict[str, Any] = {
      "kind": "subword", "vocab_size": vocab_size, "eod_id": eod_id, "tokenizer": text
    }  # fmt: skip
    if self.start_id != eod_id:
      self._plain["start_id"] = start_id
    self.digest = hashlib.sha256(json.dumps(self._plain, sort_keys=True).encode()).hexdigest()
    self._bytes_by_id = _bytes_by_id(text, ids)
    added = self._tokenizer.get_added_tokens_decoder()
    self._special = {number: token.content for number, token in added.items() if token.special}
    longest_first = sorted((token.content for token in added.values()), key=len, reverse=True)
    self._spelt = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    self._text, self._reading_specials = text, list[Any]()

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids of `text`; a special token spelled in it is ordinary text."""
    utf8(text)
    # The batch form without offsets is 1.5 times as fast as `encode`.
    encodings = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return np.array(encodings[0].ids, np.int32)

  def encode_prompt(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text to be continued.

    What the tokenizer.json adds stands around it, which may be nothing; in front of one for a
    tokenizer that was trained here the id that starts a document.
    """
    if not self._made_elsewhere:
      return np.concatenate([[self.start_id], self.encode(text)]).astype(np.int32)
    utf8(text)
    return np.array(self._tokenizer.encode(text, add_special_tokens=True).ids, np.int32)

  def specials(self, text: str) -> list[tuple[int, int]]:
    """Returns where special tokens are spelt in `text`: start and end of each, in order.

    The end of a document is one, whatever its file calls it.
    """
    special = {*self._special.values(), self._tokenizer.id_to_token(self.eod_id)}
    return [found.span() for found in self._spelt.finditer(text) if found[0] in special]

  def encode_parts(self, parts: Sequence[tuple[str, bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the int32 ids of text in parts, and (n, 2) the characters that each stands for.

    A part is (text, whether special tokens in it count as such): what a template wrote counts, what
    a user wrote does not. The parts are one text otherwise: its ids are those of the library unless
    a special token is spelled where it does not count.
    """
    for text, _ in parts:
      utf8(text)
    found, specials = self._with_specials("".join(text for text, _ in parts))
    end, fine = 0, True
    for text, counts in parts:
      start, end = end, end + len(text)
      fine &= counts or not any(a < end and start < b for a, b, _ in specials)
    if fine:
      return np.array(found.ids, np.int32), np.array(found.offsets, np.int64).reshape(-1, 2)
    return self._in_pieces(parts)

  def _in_pieces(self, parts: Sequence[tuple[str, bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and characters of text whose special tokens stand between pieces of it."""
    pieces: list[tuple[str, int | None]] = [("", None)]  # text, or a special token that counts
    for text, counts in parts:
      at = 0
      for a, b, token in self._with_specials(text)[1] if counts else ():
        pieces[-1] = pieces[-1][0] + text[at:a], None
        pieces += [(text[a:b], token), ("", None)]
        at = b
      pieces[-1] = pieces[-1][0] + text[at:], None
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    start = 0
    for text, special in pieces:
      if special is not None:
        ids, places = [*ids, special], [*places, (start, start + len(text))]
      else:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        ids += found.ids
        places += [(start + a, start + b) for a, b in found.offsets]
      start += len(text)
    return np.array(ids, np.int32), np.array(places, np.int64).reshape(-1, 2)

  def _with_specials(self, text: str) -> tuple[Any, list[tuple[int, int, int]]]:
    """Returns text whose special tokens count, encoded, and (start, end, id) of each of those."""
    if not self._reading_specials:  # of its own: others may encode at the same time
      reading = tokenizers.Tokenizer.from_str(self._text)
      reading.no_padding()
      reading.no_truncation()
      self._reading_specials.append(reading)
    found = self._reading_specials[0].encode(text, add_special_tokens=False)
    specials = [
      (a, b, token) for (a, b), token in zip(found.offsets, found.ids, strict=True)
      if text[a:b].strip() == self._special.get(token)  # what is unknown may have a token, too
    ]  # fmt: skip
    return found, specials

  def decode(self, ids: Iterable[int], special: bool = False) -> str:
    """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD.

    Special tokens have none, or where `special` is true, what they are spelt as.
    """
    left_out = () if special else {self.eod_id, self.start_id, *self._special}
    listed = [int(i) for i in ids if i not in left_out]
    if self._bytes_by_id is None:
      return self._tokenizer.decode(listed, skip_special_tokens=False)
    written = b"".join(self._bytes_by_id.get(i, b"") for i in listed)
    return written.decode("utf-8", errors="replace")

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """Returns the bytes of `ids`, of which documents are counted.

    The start and end of a document and unused ids have none. A tokenizer.json that is not
    byte-level gives the UTF-8 of its own decoder's text.
    """
    listed = [int(i) for i in ids if i not in (self.eod_id, self.start_id)]
    if self._bytes_by_id is not None:
      return b"".join(self._bytes_by_id.get(i, b"") for i in listed)
    return self._tokenizer.decode(listed, skip_special_tokens=True).encode("utf-8")

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes a JSON file for `load_tokenizer`; its field `tokenizer` is a tokenizer.json."""
    made = {"made_elsewhere": True} if self._made_elsewhere else {}
    with open(path, "w", encoding="utf-8") as file:
      json.dump({**self._plain, **made}, file)


def _bytes_by_id(text: str, ids: dict[str, int]) -> dict[int, bytes] | None:
  """Returns the bytes of every id of a byte-level tokenizer, else None."""
  plain = json.loads(text)
  if (plain.get("decoder") or {}).get("type") != "ByteLevel":
    return None
  added = {token["id"]: token["content"].encode("utf-8") for token in plain["added_tokens"]}
  byte_of = _byte_alphabet()
  levels = {i: token for token, i in ids.items() if i not in added}
  table = {i: bytes(byte_of[letter] for letter in token) for i, token in levels.items()}
  return {**table, **added}


def _byte_alphabet() -> dict[str, int]:
  """Returns {letter: byte} of the byte-level alphabet.

  Printable Latin-1 letters stand for themselves; the other bytes, in order, for the letters from
  U+0100 on.
  """
  kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  moved = [byte for byte in range(256) if byte not in kept]
  letters: dict[str, Any] = {chr(byte): byte for byte in kept}
  return {**letters, **{chr(256 + i): byte for i, byte in enumerate(moved)}}
