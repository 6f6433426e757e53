"""Validation of a source, read once: good records, and a report of what is skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.chat_format import ChatFormat, writer_for
from jaxmoe.data.document import content_digest
from jaxmoe.data.format_selection import select_format
from jaxmoe.data.message import Conversation
from jaxmoe.data.mixture import Data
from jaxmoe.data.raw_example import Content, RawExample, Source
from jaxmoe.data.skip_report import SkipReport
from jaxmoe.data.tokenizers.tokenizer import Tokenizer

_EMPTY = "an empty document"
_REPORT_EVERY = 4096  # records between two lines of progress


@dataclasses.dataclass(frozen=True, slots=True)
class ValidExample:
  """A record that passed; `raw` has lost its content, which `source.read` gives again.

  Attributes:
    in_part: Whether it is learned in part.
    talks: Whether it is a conversation.
  """

  source: Source
  raw: RawExample
  num_bytes: int
  unscored_bytes: int
  digest: bytes
  in_part: bool = False
  is_chat: bool = False


def validate_source(
  source: Source,
  data: Data,
  tokenizer: Tokenizer | None,
  skipped: SkipReport,
  say: Callable[[str], None],
) -> list[ValidExample]:
  """Returns the good records of `source` in name order and adds the bad ones to `skipped`.

  Args:
    source: Read once, whole.
    data: The limits.
    tokenizer: Checks records given as ids; None when it is still to be trained.
    skipped: The report of all sources.
    say: Takes lines of progress.

  Raises:
    InputError: nothing is there, too much of it is bad, or a file of records is broken.
  """
  examples, chat = [], select_format(data)
  try:
    for number, raw in enumerate(source.scan(data.max_record_bytes), 1):
      if number % _REPORT_EVERY == 0:
        say(f"reading {source.domain}: {number} records")
      if raw.lost_bytes is not None:
        skipped.add_broken(source.domain, raw, data.allow_broken_files)
        continue
      why = raw.error or _find_error(raw.content, tokenizer, chat)
      example = None if why else _valid_example(source, raw, tokenizer, chat)
      if example is None or not example.num_bytes:
        skipped.add(source.domain, raw.place, why or _EMPTY)
      else:
        examples.append(example)
  except InputError as error:
    raise InputError(f"source {source.domain!r}: {error}") from None
  skipped.check(source, len(examples), data.max_bad_share)
  for line in skipped.lines(source.domain):
    say(line)
  return sorted(examples, key=lambda example: example.raw.name)


def _find_error(content: Content | None, tokenizer: Tokenizer | None, chat: ChatFormat) -> str:
  """Returns why the content of a record cannot be used, or ''."""
  if isinstance(content, str):
    return "" if content.strip() else _EMPTY
  if content is not None and not isinstance(content, np.ndarray):
    return writer_for(content, chat).find_error(content, tokenizer)
  ids = np.asarray(content)
  if not ids.size:
    return _EMPTY
  if tokenizer is None:
    return "ids given for a tokenizer that is trained on text"
  if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
    return "an id out of the vocabulary"
  return "the end-of-document id inside a document" if (ids == tokenizer.eod_id).any() else ""


def _valid_example(
  source: Source, raw: RawExample, tokenizer: Tokenizer | None, chat: ChatFormat
) -> ValidExample:
  content, unscored, in_part = raw.content, 0, False
  assert content is not None
  if isinstance(content, str):
    num_bytes = len(content.encode("utf-8"))
  elif isinstance(content, np.ndarray):
    assert tokenizer is not None
    num_bytes = len(tokenizer.decode_bytes(content))
  else:
    pieces = writer_for(content, chat).text(content, tokenizer)
    sizes = [(len(text.encode("utf-8")), learned) for text, learned in pieces]
    num_bytes, in_part = sum(size for size, _ in sizes), True
    unscored = sum(size for size, learned in sizes if not learned)
  light = dataclasses.replace(raw, content=None)
  is_chat = isinstance(content, Conversation)
  return ValidExample(source, light, num_bytes, unscored, content_digest(content), in_part, is_chat)
