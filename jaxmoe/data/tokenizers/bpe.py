"""Byte-level byte-pair encoding, trained on the training split only.

Training is deterministic: the same texts and settings give the same file in every process. The
result is kept under the digest of both, so a second run reads it. Every UTF-8 text is encoded
without loss, since the alphabet is the 256 bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxmoe.core.config_io import to_plain
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import write_atomic
from jaxmoe.data.tokenizers.subword import SubwordTokenizer

_EOD = "<|endoftext|>"
_EOD_ID = 0


@dataclasses.dataclass(frozen=True)
class Bpe:
  """Byte-pair encoding trained on the corpus.

  Attributes:
    vocab_size: Exactly how many ids there are: 256 bytes, the end of a document, the merges.
    max_train_bytes: Training reads no more than about this much text.
  """

  vocab_size: int = 2048
  max_train_bytes: int = 100_000_000
  trains: ClassVar[bool] = True

  def __post_init__(self) -> None:
    if self.vocab_size < 257:
      raise InputError(
        f"vocab_size must be at least 257 (256 bytes and the end of a document), "
        f"got {self.vocab_size}"
      )
    if self.max_train_bytes < 1:
      raise InputError(f"max_train_bytes must be at least 1, got {self.max_train_bytes}")

  def build(
    self,
    texts: Iterable[str],
    digest: str,
    cache_dir: str | os.PathLike[str] | None,
    say: Callable[[str], None],
  ) -> SubwordTokenizer:
    """Returns the tokenizer trained on `texts`, or the one kept in `cache_dir` for `digest`.

    Raises:
      InputError: the texts are too few for `vocab_size` merges.
    """
    settings = json.dumps([to_plain(self, as_before=True), digest, tokenizers.__version__])
    key = hashlib.sha256(settings.encode()).hexdigest()[:32]
    path = None if cache_dir is None else os.path.join(cache_dir, f"bpe-{key}.json")
    text = None if path is None else _read_kept(path, say)
    if text is None:
      say(f"training a tokenizer of {self.vocab_size} ids")
      text = self._train(texts)
      if path is not None:
        _keep(path, text, say)
    return SubwordTokenizer(text, self.vocab_size, _EOD_ID)

  def _train(self, texts: Iterable[str]) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
      vocab_size=self.vocab_size,
      special_tokens=[_EOD],
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    )
    tokenizer.train_from_iterator(_up_to(texts, self.max_train_bytes), trainer)
    found = tokenizer.get_vocab_size()
    if found != self.vocab_size:
      raise InputError(
        f"the training split is too small for a vocab_size of {self.vocab_size}: it gives "
        f"{found} ids; set --config.data.tokenizer.vocab_size={found} or add text"
      )
    return tokenizer.to_str()


def _up_to(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
  total = 0
  for text in texts:
    yield text
    total += len(text.encode("utf-8"))
    if total >= max_bytes:
      return


def _read_kept(path: str, say: Callable[[str], None]) -> str | None:
  """Returns the kept tokenizer.json; None if there is none or it is damaged."""
  if not os.path.exists(path):
    return None
  try:
    with open(path, encoding="utf-8") as file:
      kept = json.load(file)
    if hashlib.sha256(kept["tokenizer"].encode()).hexdigest() == kept["sha256"]:
      say(f"using the tokenizer kept in {path}")
      return kept["tokenizer"]
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    pass
  say(f"{path} is damaged: training the tokenizer again")
  return None


def _keep(path: str, text: str, say: Callable[[str], None]) -> None:
  """Writes the file, if its disk takes it, whoever else writes it at the same time."""
  kept = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokenizer": text}
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_atomic(path, json.dumps(kept))
  except OSError as error:
    say(f"cannot keep the tokenizer in {path} ({error.strerror}): the next run trains it again")
