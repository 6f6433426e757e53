"""Reading a source once: good records, and a report of the bad ones.

A bad record is skipped, counted by source and reason, and listed by its place. More than the stated
share of a source's records stops the run.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.chat import Chat
from jaxmoe.data.document import content_digest
from jaxmoe.data.entry import Content, Entry, Source
from jaxmoe.data.mixture import Data
from jaxmoe.data.tokenizers.tokenizer import Tokenizer

_MAX_LISTED = 1000  # places of bad records that are listed; the counts are always complete
_EMPTY = "an empty document"
_REPORT_EVERY = 4096  # records between two lines of progress


@dataclasses.dataclass(frozen=True, slots=True)
class Good:
  """A record that passed; `entry` has lost its content, which `source.read` gives again."""

  source: Source
  entry: Entry
  num_bytes: int
  unscored_bytes: int
  digest: bytes


class Skipped:
  """Counts and lists bad records."""

  def __init__(self) -> None:
    self._counts: dict[str, collections.Counter[str]] = {}
    self._places: list[str] = []

  def add(self, domain: str, place: str, flaw: str) -> None:
    """Takes note of one bad record."""
    self._counts.setdefault(domain, collections.Counter())[flaw] += 1
    if len(self._places) < _MAX_LISTED:
      self._places.append(f"{place}: {flaw}")

  def check(self, domain: str, num_good: int, max_share: float) -> None:
    """Raises InputError when a source has no good record, or more than `max_share` bad ones."""
    counts = self._counts.get(domain, collections.Counter())
    bad = sum(counts.values())
    if num_good and bad <= max_share * (bad + num_good):
      return
    reasons = ", ".join(f"{flaw} ({n})" for flaw, n in counts.most_common()) or "it is empty"
    # Sources are scanned one after the other, so the last places are this one's.
    listed = self._places[-min(bad, 3) :] if bad else []
    raise InputError(
      f"source {domain!r}: {bad} of {bad + num_good} records cannot be used: {reasons}"
      f"{'; such as ' if listed else ''}{', '.join(listed)}; mend them, or allow more bad records "
      f"than --config.data.max_bad_share={max_share}"
    )

  def plain(self) -> dict[str, Any]:
    """Returns the report as nested dicts and lists."""
    counts = {domain: dict(sorted(counts.items())) for domain, counts in self._counts.items()}
    return {"counts": counts, "places": list(self._places)}


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
    InputError: nothing is there, or too much of it is bad.
  """
  goods = []
  try:
    for number, entry in enumerate(source.scan(data.max_record_bytes), 1):
      if number % _REPORT_EVERY == 0:
        say(f"reading {source.domain}: {number} records")
      flaw = entry.flaw or _flaw(entry.content, tokenizer, data.chat)
      good = None if flaw else _good(source, entry, tokenizer, data.chat)
      if good is None or not good.num_bytes:
        skipped.add(source.domain, entry.place, flaw or _EMPTY)
      else:
        goods.append(good)
  except InputError as error:
    raise InputError(f"source {source.domain!r}: {error}") from None
  skipped.check(source.domain, len(goods), data.max_bad_share)
  return sorted(goods, key=lambda good: good.entry.name)


def _flaw(content: Content | None, tokenizer: Tokenizer | None, chat: Chat) -> str:
  """Returns why the content of an entry cannot be used, or ''."""
  if isinstance(content, str):
    return "" if content.strip() else _EMPTY
  if isinstance(content, tuple):
    return chat.flaw(content)
  ids = np.asarray(content)
  if not ids.size:
    return _EMPTY
  if tokenizer is None:
    return "ids given for a tokenizer that is trained on text"
  if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
    return "an id out of the vocabulary"
  return "the end-of-document id inside a document" if (ids == tokenizer.eod_id).any() else ""


def _good(source: Source, entry: Entry, tokenizer: Tokenizer | None, chat: Chat) -> Good:
  content, unscored = entry.content, 0
  assert content is not None
  if isinstance(content, str):
    num_bytes = len(content.encode("utf-8"))
  elif isinstance(content, tuple):
    sizes = [(len(text.encode("utf-8")), learned) for text, learned in chat.pieces(content)]
    num_bytes = sum(size for size, _ in sizes)
    unscored = sum(size for size, learned in sizes if not learned)
  else:
    assert tokenizer is not None
    num_bytes = len(tokenizer.decode_bytes(content))
  light = dataclasses.replace(entry, content=None)
  return Good(source, light, num_bytes, unscored, content_digest(content))
