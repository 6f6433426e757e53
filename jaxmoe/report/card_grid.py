"""The grid of cards on a page: three, two or one in a row, and no place in a row is empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxmoe.report.html import Html, fold, join, tag


def grid(*cards: Html | None) -> Html | None:
  """Returns cards in as many columns as fit; None for no cards."""
  there = [card for card in cards if card is not None]
  return tag("div", *there, class_="grid") if there else None


def first_cards(cards: Sequence[Html | None], shown: int, what: str) -> Html:
  """Returns a grid of the first cards, and the others, if any, behind a line that opens them."""
  there = [card for card in cards if card is not None]
  return join(grid(*there[:shown]), folded_cards(there[shown:], what))


def folded_cards(cards: Sequence[Html], what: str) -> Html | None:
  """Returns cards behind a line that opens them, None for no cards."""
  return fold(f"{len(cards)} more {what}", grid(*cards)) if cards else None


def tiles(figures: Mapping[str, str]) -> Html:
  """Returns figures with their names, in one row, in two, or two in a row; each on one line."""
  number = len(figures)
  return tag("div", *(
    tag("div", tag("span", name), tag("b", value, style=f"--n:{len(value)}"), class_="tile")
    for name, value in figures.items()
  ), class_="tiles", style=f"--wide:{number};--middle:{-(-number // 2)}")  # fmt: skip
