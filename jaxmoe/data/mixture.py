"""The data mixture of a recipe: which domains, in what proportion, how cut, how checked."""

from __future__ import annotations

import dataclasses
import datetime
import math
from typing import Literal

from jaxmoe.core.config_io import added, choice
from jaxmoe.core.errors import InputError
from jaxmoe.data.chat_format import PlainChatFormat
from jaxmoe.data.raw_example import Source
from jaxmoe.data.sources import SOURCES
from jaxmoe.data.tokenizers import TOKENIZERS
from jaxmoe.data.tokenizers.byte import Bytes
from jaxmoe.data.tokenizers.tokenizer import TokenizerRecord


@dataclasses.dataclass(frozen=True)
class MixturePart:
  """One domain of the mixture.

  Attributes:
    source: Where its documents come from.
    weight: Its share of the tokens, relative to the other parts. Rows are packed by domain and
      mixed row by row, so the share holds in every stretch of rows (to 1% of itself), whatever
      the length of the documents.
  """

  source: Source = choice(SOURCES)
  weight: float = 1.0

  def __post_init__(self) -> None:
    if not (self.weight > 0 and math.isfinite(self.weight)):
      raise InputError(f"weight must be positive and finite, got {self.weight}; or drop the part")


@dataclasses.dataclass(frozen=True)
class Data:
  """What the model reads.

  Attributes:
    parts: The mixture; every part is one domain with a name of its own.
    tokenizer: Text to ids; it owns the vocabulary size.
    seq_len: Tokens in a row.
    held_out: The share of files (or records) that are never trained on; of a domain that is one
      text, the share at its end.
    max_bad_share: More bad records than this share of a source stop the run.
    max_record_bytes: A larger document, or line of a .jsonl file, is bad.
    shuffle_tokens: Rows are shuffled in windows of this many tokens, shared by weight, so that
      neighbours in a batch are from different documents.
    cache_bytes: Memory for ids that are kept instead of tokenized again.
    chat: How documents given as messages become text, and what of them is learned; None for the
      chat template that came with the tokenizer, where there is one, else for
      `PlainChatFormat()`.
    chat_date: The day, as 2026-11-30, that a chat template which asks for it is told, in training
      and evaluation; set when a run is made.
    worker: What makes batches ahead of the step: a thread of the process that trains, or a process
      beside it, which takes no time from the step's own Python code and is replaced when it dies.
      Batches are the same. A process reads the corpus and keeps ids once more for itself.
    allow_broken_files: Whether a file of records (.jsonl, .parquet, ...) that ends early or cannot
      be opened gives what it can, in place of stopping the run. What it lost is told in bytes.
  """

  parts: tuple[MixturePart, ...]
  tokenizer: TokenizerRecord = choice(TOKENIZERS, Bytes())
  seq_len: int = 128
  held_out: float = 0.05
  max_bad_share: float = 0.01
  max_record_bytes: int = 50_000_000
  shuffle_tokens: int = 2**19
  cache_bytes: int = 2**28
  chat: PlainChatFormat | None = added(None, before=PlainChatFormat())
  worker: Literal["thread", "process"] = "thread"
  allow_broken_files: bool = added(False, before=True)
  chat_date: str | None = added(None, before=None)

  def __post_init__(self) -> None:
    if not self.parts:
      raise InputError("parts is empty; give at least one source")
    domains = [part.source.domain for part in self.parts]
    if len(set(domains)) != len(domains):
      raise InputError(f"two parts have the same domain: {domains}; set domain in their sources")
    if not 0 < self.held_out < 1:
      raise InputError(f"held_out must be between 0 and 1, got {self.held_out}")
    if not 0 <= self.max_bad_share <= 1:
      raise InputError(f"max_bad_share must be in [0, 1], got {self.max_bad_share}")
    for name in ("seq_len", "max_record_bytes", "shuffle_tokens"):
      if getattr(self, name) < 1:
        raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
    if self.worker not in ("thread", "process"):
      raise InputError(f"worker must be 'thread' or 'process', got {self.worker!r}")
    try:
      datetime.date.fromisoformat(self.chat_date or "2000-01-01")
    except ValueError:
      raise InputError(
        f"chat_date must be a day such as 2026-11-30, got {self.chat_date!r}"
      ) from None
    if self.cache_bytes < 0:
      raise InputError(f"cache_bytes must not be negative, got {self.cache_bytes}")
