"""A domain of one document holds out its end, which starts a paragraph, a line or a word."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jaxmoe.data.document import content_digest
from jaxmoe.data.raw_example import Content, Entry, Source
from jaxmoe.data.validation import Good

_BORDERS = ("\n\n", "\n", " ")
END = " (its end)"
"""What the name of the part that is held out ends in."""


@dataclasses.dataclass(frozen=True)
class Parts:
  """A source of parts of the texts of another; a locator is (the other's, start, end)."""

  of: Source

  @property
  def domain(self) -> str:
    """The name of the domain."""
    return self.of.domain

  def scan(self, max_bytes: int) -> Iterator[Entry]:
    """Yields what the other source does."""
    return self.of.scan(max_bytes)

  def read(self, locator: tuple[object, int, int]) -> Content:
    """Returns the characters from `start` to `end` of a text."""
    whole, start, end = locator
    text = self.of.read(whole)
    if not isinstance(text, str):
      raise ValueError("no text any more")
    return text[start:end]


def split_end(good: Good, share: float) -> tuple[Good, Good] | None:
  """Returns a document without its end, and its end; None where it is no text that can be cut.

  The end is the smallest that has `share` of the characters and starts a paragraph, or else a line,
  or else a word, unless it would be twice as long.
  """
  text = good.source.read(good.entry.locator)
  if not isinstance(text, str) or good.entry.answer is not None:
    return None
  at = _border(text, share)
  if not (text[:at].strip() and text[at:].strip()):
    return None
  source = Parts(good.source)
  return (
    _part(good, source, text, (0, at), good.entry.name),
    _part(good, source, text, (at, len(text)), good.entry.name + END),
  )


def _border(text: str, share: float) -> int:
  most, least = int(len(text) * (1 - share)), int(len(text) * (1 - 2 * share))
  for border in _BORDERS:
    found = text.rfind(border, max(least, 0), most)
    if found >= 0:
      return found + len(border)
  return most


def _part(good: Good, source: Source, text: str, span: tuple[int, int], name: str) -> Good:
  part = text[slice(*span)]
  locator = (good.entry.locator, *span)
  unit = f"{good.entry.unit}{span}"
  entry = dataclasses.replace(good.entry, name=name, unit=unit, locator=locator)
  return Good(source, entry, len(part.encode("utf-8")), 0, content_digest(part))
