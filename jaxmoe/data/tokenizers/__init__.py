"""Text to ids and back; one file and one line per tokenizer."""

from __future__ import annotations

import json
import os

from jaxmoe.core.errors import InputError
from jaxmoe.data.tokenizers.bpe import Bpe
from jaxmoe.data.tokenizers.byte import Bytes, ByteTokenizer
from jaxmoe.data.tokenizers.subword import SubwordTokenizer
from jaxmoe.data.tokenizers.tokenizer import Tokenizer
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile

TOKENIZERS = {
  "bytes": (Bytes, Bytes()),
  "bpe": (Bpe, Bpe(vocab_size=300)),
  "file": (TokenizerFile, TokenizerFile(path="tokenizer.json", vocab_size=300)),
}

__all__ = ["TOKENIZERS", "Tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | os.PathLike[str], made_elsewhere: bool = False) -> Tokenizer:
  """Returns the tokenizer that `save` wrote to `path`, whatever its kind.

  Args:
    path: The file.
    made_elsewhere: Whether it is of a `TokenizerFile`, where the file is too old to say it.

  Raises:
    InputError: the file is missing or not one of ours.
  """
  try:
    with open(path, encoding="utf-8") as file:
      plain = json.load(file)
    kind = plain["kind"]
    if kind == "bytes":
      return ByteTokenizer()
    if kind == "subword":
      ends = plain["eod_id"], plain.get("start_id")
      made = bool(plain.get("made_elsewhere", made_elsewhere))
      return SubwordTokenizer(plain["tokenizer"], plain["vocab_size"], *ends, made)
  except OSError as error:
    raise InputError(f"{path}: cannot read the tokenizer ({error.strerror})") from None
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(f"{path}: not a saved tokenizer ({error}); save it again") from None
  raise InputError(f"{path}: unknown tokenizer kind {kind!r}; known: bytes, subword")
