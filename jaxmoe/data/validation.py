"""Reading a source once: good records, and a report of what is skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.chat_format import Format, writer
from jaxmoe.data.document import content_digest
from jaxmoe.data.format_selection import format_of
from jaxmoe.data.message import Conversation
from jaxmoe.data.mixture import Data
from jaxmoe.data.raw_example import Content, Entry, Source
from jaxmoe.data.skip_report import Skipped
from jaxmoe.data.tokenizers.tokenizer import Tokenizer

_EMPTY = "an empty document"
_REPORT_EVERY = 4096  # records between two lines of progress


@dataclasses.dataclass(frozen=True, slots=True)
class Good:
  """A record that passed; `entry` has lost its content, which `source.read` gives again.

  Attributes:
    in_part: Whether it is learned in part.
    talks: Whether it is a conversation.
  """

  source: Source
  entry: Entry
  num_bytes: int
  unscored_bytes: int
  digest: bytes
  in_part: bool = False
  talks: bool = False


def scan(
  source: Source,
  data: Data,
  tokenizer: Tokenizer | None,
  skipped: Skipped,
  say: Callable[[str], None],
) -> list[Good]:
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
  goods, chat = [], format_of(data)
  try:
    for number, entry in enumerate(source.scan(data.max_record_bytes), 1):
      if number % _REPORT_EVERY == 0:
        say(f"reading {source.domain}: {number} records")
      if entry.lost_bytes is not None:
        skipped.add_broken(source.domain, entry, data.allow_broken_files)
        continue
      flaw = entry.flaw or _flaw(entry.content, tokenizer, chat)
      good = None if flaw else _good(source, entry, tokenizer, chat)
      if good is None or not good.num_bytes:
        skipped.add(source.domain, entry.place, flaw or _EMPTY)
      else:
        goods.append(good)
  except InputError as error:
    raise InputError(f"source {source.domain!r}: {error}") from None
  skipped.check(source, len(goods), data.max_bad_share)
  for line in skipped.lines(source.domain):
    say(line)
  return sorted(goods, key=lambda good: good.entry.name)


def _flaw(content: Content | None, tokenizer: Tokenizer | None, chat: Format) -> str:
  """Returns why the content of an entry cannot be used, or ''."""
  if isinstance(content, str):
    return "" if content.strip() else _EMPTY
  if content is not None and not isinstance(content, np.ndarray):
    return writer(content, chat).flaw(content, tokenizer)
  ids = np.asarray(content)
  if not ids.size:
    return _EMPTY
  if tokenizer is None:
    return "ids given for a tokenizer that is trained on text"
  if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
    return "an id out of the vocabulary"
  return "the end-of-document id inside a document" if (ids == tokenizer.eod_id).any() else ""


def _good(source: Source, entry: Entry, tokenizer: Tokenizer | None, chat: Format) -> Good:
  content, unscored, in_part = entry.content, 0, False
  assert content is not None
  if isinstance(content, str):
    num_bytes = len(content.encode("utf-8"))
  elif isinstance(content, np.ndarray):
    assert tokenizer is not None
    num_bytes = len(tokenizer.decode_bytes(content))
  else:
    pieces = writer(content, chat).text(content, tokenizer)
    sizes = [(len(text.encode("utf-8")), learned) for text, learned in pieces]
    num_bytes, in_part = sum(size for size, _ in sizes), True
    unscored = sum(size for size, learned in sizes if not learned)
  light = dataclasses.replace(entry, content=None)
  talks = isinstance(content, Conversation)
  return Good(source, light, num_bytes, unscored, content_digest(content), in_part, talks)
