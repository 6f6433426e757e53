"""Building HTML in which text is escaped unless it was built here."""

from __future__ import annotations

import html
import json
import re
from typing import Any

EMPTY = frozenset({"meta", "input", "br", "path", "rect", "line", "circle", "polyline"})
STACKS = range(320, 1441, 80)
"""Widths of a screen in pixels; a table that needs as much is shown row by row below that."""
MARGINS, LETTER = 24, 8.4
_TAG = re.compile(r"<[^>]*>")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Html(str):
  """Text that is HTML already."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
  """Returns an element; children and values that are not `Html` are escaped.

  Attributes that are None or False are left out; `_` stands for `-`, and one at the end for
  nothing: `class_`.
  """
  shown = "".join(
    f' {key.rstrip("_").replace("_", "-")}="{escape("" if value is True else value)}"'
    for key, value in attributes.items()
    if value is not None and value is not False
  )
  if name in EMPTY and not children:
    return Html(f"<{name}{shown}/>")
  return Html(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*parts: Any) -> Html:
  """Returns parts one after the other; None is nothing."""
  return Html("".join(escape(part) for part in parts if part is not None))


def escape(value: Any) -> str:
  """Returns the text of a value as HTML; characters no page may hold become U+FFFD."""
  if isinstance(value, Html):
    return value
  return html.escape(_CONTROL.sub("\ufffd", str(value)))


def data(plain: Any) -> Html:
  """Returns the numbers of a picture as JSON that a program can read and a page does not show."""
  text = json.dumps(plain, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
  return Html(f'<script type="application/json" class="plotted">{text}</script>')


def table(head: list[str], rows: list[list[Any]], text_columns: int = 1) -> Html:
  """Returns a table; columns after the first few are right-aligned.

  On a screen that it would reach over, a row is a list of names and values.
  """

  def row(cells: list[Any], kind: str) -> Html:
    marks = ["text" if i < text_columns else None for i in range(len(cells))]
    names = head if kind == "td" else [None] * len(cells)  # type: ignore[list-item]
    return tag("tr", *(
      tag(kind, cell, class_=mark, data_name=name) for cell, mark, name in zip(cells, marks, names)
    ))  # fmt: skip

  body = tag("tbody", *(row(cells, "td") for cells in rows))
  needs = _width(head, rows, text_columns) + MARGINS
  limit = next((limit for limit in STACKS if needs <= limit), STACKS[-1])
  shown = tag("table", tag("thead", row(list(head), "th")), body, class_=f"below{limit}")
  return tag("div", shown, class_="scroll")


def _width(head: list[str], rows: list[list[Any]], text_columns: int) -> float:
  """Returns about how many pixels a table needs: text may break between words, values not."""
  total = 0.0
  for i, name in enumerate(head):
    cells = [_TAG.sub("", str(cells[i])) for cells in rows if i < len(cells)]
    pieces = [word for cell in cells for word in (cell.split() if i < text_columns else [cell])]
    longest = max([*map(len, pieces), *map(len, name.split())], default=0)
    total += LETTER * min(longest, 60) + 12
  return total


def fold(summary: Any, *children: Any, open_: bool = False) -> Html:
  """Returns children behind a line that opens them."""
  return tag("details", tag("summary", summary), *children, open=open_)
