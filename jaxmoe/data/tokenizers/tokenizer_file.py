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
class TokenizerFile:
  """A tokenizer.json of the tokenizers library.

  Attributes:
    path: The file.
    vocab_size: Every id is below it; may be larger than the file's, as padded vocabularies are.
    eod: The token that ends a document, as the file spells it.
    start: The token that starts one, such as <s>; none for that of the end.
  """

  path: str
  vocab_size: int
  eod: str = "<|endoftext|>"
  start: str | None = None
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
      with open(self.path, encoding="utf-8-sig") as file:
        text = file.read()
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f"{self.path}: cannot read the tokenizer ({error})") from None
    try:
      tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
      raise InputError(f"{self.path}: not a tokenizer.json ({error})") from None
    ends: list[int | None] = []
    for field, token in (("eod", self.eod), ("start", self.start)):
      ends.append(None if token is None else tokenizer.token_to_id(token))
      if token is not None and ends[-1] is None:
        raise InputError(f"{self.path}: has no token {token!r}; set {field} to one that it has")
    assert ends[0] is not None
    return SubwordTokenizer(text, self.vocab_size, ends[0], ends[1], made_elsewhere=True)
