"""How cards stand on a page."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmoe.report.html import Html, fold, tag


def grid(*cards: Html | None) -> Html:
  """Returns cards in as many columns as fit."""
  return tag("div", *cards, class_="grid")


def few(cards: Sequence[Html], shown: int, what: str) -> list[Html]:
  """Returns the first cards as they are and the others, if any, behind a line that opens them."""
  if len(cards) <= shown:
    return list(cards)
  rest = fold(f"{len(cards) - shown} more {what}", grid(*cards[shown:]))
  return [*cards[:shown], tag("div", rest, style="grid-column: 1 / -1")]
