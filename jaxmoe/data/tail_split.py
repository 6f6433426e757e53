"""The held-out tail of a domain of one document: it starts a paragraph, a line or a word."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jaxmoe.data.document import content_digest
from jaxmoe.data.raw_example import Content, RawExample, Source
from jaxmoe.data.validation import ValidExample

_BORDERS = ("\n\n", "\n", " ")
END = " (its end)"
"""What the name of the part that is held out ends in."""


@dataclasses.dataclass(frozen=True)
class TextSlices:
  """A source of parts of the texts of another; a locator is (the other's, start, end)."""

  of: Source

  @property
  def domain(self) -> str:
    """The name of the domain."""
    return self.of.domain

  def scan(self, max_bytes: int) -> Iterator[RawExample]:
    """Yields what the other source does."""
    return self.of.scan(max_bytes)

  def read(self, locator: tuple[object, int, int]) -> Content:
    """Returns the characters from `start` to `end` of a text."""
    whole, start, end = locator
    text = self.of.read(whole)
    if not isinstance(text, str):
      raise ValueError("no text any more")
    return text[start:end]


def split_tail(example: ValidExample, share: float) -> tuple[ValidExample, ValidExample] | None:
  """Returns a document without its end, and its end; None where it is no text that can be cut.

  The end is the smallest that has `share` of the characters and starts a paragraph, or else a line,
  or else a word, unless it would be twice as long.
  """
  text = example.source.read(example.raw.locator)
  if not isinstance(text, str) or example.raw.answer is not None:
    return None
  at = _border(text, share)
  if not (text[:at].strip() and text[at:].strip()):
    return None
  source = TextSlices(example.source)
  return (
    _part(example, source, text, (0, at), example.raw.name),
    _part(example, source, text, (at, len(text)), example.raw.name + END),
  )


def _border(text: str, share: float) -> int:
  most, least = int(len(text) * (1 - share)), int(len(text) * (1 - 2 * share))
  for border in _BORDERS:
    found = text.rfind(border, max(least, 0), most)
    if found >= 0:
      return found + len(border)
  return most


def _part(
  example: ValidExample, source: Source, text: str, span: tuple[int, int], name: str
) -> ValidExample:
  part = text[slice(*span)]
  locator = (example.raw.locator, *span)
  unit = f"{example.raw.unit}{span}"
  raw = dataclasses.replace(example.raw, name=name, unit=unit, locator=locator)
  return ValidExample(source, raw, len(part.encode("utf-8")), 0, content_digest(part))
