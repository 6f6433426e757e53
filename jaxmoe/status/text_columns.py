"""Text that fits a terminal: cut to a width in cells, in letters that the output can show."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator

from rich.cells import cell_len, set_cell_size

WIDTH = 80


def fit(text: str, width: int = WIDTH) -> str:
  """Returns a line of at most `width` cells without control characters; `...` where it was cut."""
  text = "".join(" " if unicodedata.category(letter)[0] == "C" else letter for letter in text)
  if cell_len(text) <= width:
    return text
  return set_cell_size(text, max(width - 3, 0)).rstrip() + "..."[:width]


def shown(text: str, encoding: str | None) -> str:
  """Returns text as an output of that encoding can show it: `?` for what it cannot."""
  return text.encode(encoding or "ascii", "replace").decode(encoding or "ascii")


def labelled(
  label: str, items: Iterable[str], width: int = WIDTH, gap: str = "  "
) -> Iterator[str]:
  """Yields lines that start with a label of ten cells, with as many items a line as fit."""
  head, line = f"{label:<10}", ""
  for item in items:
    item = fit(item, width - len(head))
    if line and cell_len(line) + len(gap) + cell_len(item) > width - len(head):
      yield (head + line).rstrip()
      head, line = " " * len(head), ""
    line = line + gap + item if line else item
  yield (head + line).rstrip()


def ago(seconds: float) -> str:
  """Returns a time that went by in its largest unit: `5 s`, `3 min`, `2 h`, `4 days`."""
  for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
    if seconds < limit:
      return f"{max(seconds, 0) / size:.0f} {unit}"
  return f"{seconds / 86_400:.0f} days"


def clock(seconds: float) -> str:
  """Returns a duration as `h:mm:ss` or `m:ss`."""
  minutes, rest = divmod(int(max(seconds, 0)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
