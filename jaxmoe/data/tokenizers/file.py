"""A tokenizer.json made elsewhere."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import ClassVar

import tokenizers

from jaxmoe.core.errors import InputError
from jaxmoe.data.tokenizers.subword import SubwordTokenizer


@dataclasses.dataclass(frozen=True)
class File:
  """A tokenizer.json of the tokenizers library.

  Attributes:
    path: The file.
    vocab_size: Every id is below it; may be larger than the file's, as padded vocabularies are.
    eod: The token that ends a document, as the file spells it.
  """

  path: str
  vocab_size: int
  eod: str = "<|endoftext|>"
  trains: ClassVar[bool] = False

  def __post_init__(self) -> None:
    if not self.path or self.vocab_size < 2:
      raise InputError(f"needs a path and a vocab_size of at least 2, got {self}")

  def build(
    self,
    texts: Iterable[str],
    digest: str,
    cache_dir: str | os.PathLike[str] | None,
    say: Callable[[str], None],
  ) -> SubwordTokenizer:
    """Returns the tokenizer in the file.

    Raises:
      InputError: no such file, not a tokenizer.json, no such token, or a vocab_size too small.
    """
    try:
      with open(self.path, encoding="utf-8") as file:
        text = file.read()
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f"{self.path}: cannot read the tokenizer ({error})") from None
    try:
      eod_id = tokenizers.Tokenizer.from_str(text).token_to_id(self.eod)
    except Exception as error:  # the library raises bare Exception
      raise InputError(f"{self.path}: not a tokenizer.json ({error})") from None
    if eod_id is None:
      raise InputError(f"{self.path}: has no token {self.eod!r}; set eod to its end of a document")
    return SubwordTokenizer(text, self.vocab_size, eod_id)
