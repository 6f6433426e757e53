"""The tokenizer protocol, and that of the record a tokenizer is made from.

A record (a component of a recipe) states the vocabulary size; `build` makes the tokenizer from it
once the training split is known.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol

import numpy as np

from jaxmoe.core.errors import InputError

BoundaryIds = tuple[int, int]
"""The ids that a document starts with as input, and ends with as label."""


class Tokenizer(Protocol):
  """Text to ids and back.

  Attributes:
    vocab_size: Every id is below it.
    start_id: The id that every document starts with; that of the end of the one before, where the
      tokenizer knows no other.
    eod_id: The id of the end of a document; `encode` never returns it, `decode` gives it no text.
    digest: Hexadecimal digest of everything `encode` depends on.
  """

  vocab_size: int
  start_id: int
  eod_id: int
  digest: str

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids of `text`, which is ordinary text whatever it spells."""

  def encode_prompt(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text to be continued, with what belongs around one."""

  def decode(self, ids: Iterable[int], special: bool = False) -> str:
    """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD.

    Special tokens have none, or where `special` is true, what they are spelt as.
    """

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """Returns the bytes of `ids`."""

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes a JSON file for `load_tokenizer`."""


class TokenizerRecord(Protocol):
  """The component of a recipe that a tokenizer is built from."""

  trains: ClassVar[bool]

  @property
  def vocab_size(self) -> int:
    """Every id is below it; known before anything is read."""

  def build(
    self,
    texts: Iterable[str],
    digest: str,
    cache_dir: str | os.PathLike[str] | None,
    say: Callable[[str], None],
  ) -> Tokenizer:
    """Returns the tokenizer; `texts` is the training split and `digest` its digest."""


def utf8(text: str) -> bytes:
  """Returns `text` as UTF-8.

  Raises:
    InputError: half a surrogate pair, as undecodable bytes of a command line become.
  """
  try:
    return text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise InputError(
      f"text cannot be written as UTF-8 (half a surrogate pair at {error.start}); "
      "pass valid UTF-8"
    ) from None
