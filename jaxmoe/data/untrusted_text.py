"""Text that a template may ask about and cut, but never writes: what it writes is a mark."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Owner = tuple[int, str]
"""The number of a message, and which of its fields; -1 for what is of no message."""

OwnedText = tuple[str, Owner | None]
"""Some text and whose it is; None for the template's own."""

MARK = re.compile("\ue000([0-9]+)\ue001")


class UntrustedStr(str):
  """A message, or a piece of one with what a template put beside it.

  As a string it has marks in the place of what users wrote, which `parts_of` turns back into text.
  Methods that ask, cut or join act on the text; those that would change it are refused, unless it
  is of no message: a template may write the types of tools in capitals.
  """

  _runs: tuple[OwnedText, ...]
  _known: list[OwnedText]

  def __new__(cls, runs: Sequence[OwnedText], known: list[OwnedText]) -> UntrustedStr:
    """Makes one of runs; those of users are added to `known`, and a mark is a place there."""
    runs = tuple(run for run in runs if run[0])
    written = ""
    for text, owner in runs:
      if owner is not None:
        known.append((text, owner))
      written += text if owner is None else f"\ue000{len(known) - 1}\ue001"
    marked = super().__new__(cls, written)
    marked._runs, marked._known = runs, known
    return marked

  @property
  def _text(self) -> str:
    return "".join(text for text, _ in self._runs)

  def _cut(self, start: int, stop: int) -> UntrustedStr:
    """Returns the text from one place to another."""
    runs, at = [], 0
    for text, owner in self._runs:
      runs.append((text[max(start - at, 0) : max(stop - at, 0)], owner))
      at += len(text)
    return UntrustedStr(runs, self._known)

  def _pieces(self, found: list[str]) -> list[UntrustedStr]:
    """Returns pieces of the text that follow each other in it, with something between or not."""
    pieces, at = [], 0
    for piece in found:
      start = self._text.index(piece, at)
      at = start + len(piece)
      pieces.append(self._cut(start, at))
    return pieces

  def strip(self, chars: Any = None) -> UntrustedStr:  # noqa: D102
    return self.lstrip(chars).rstrip(chars)

  def lstrip(self, chars: Any = None) -> UntrustedStr:  # noqa: D102
    size = len(self._text)
    return self._cut(size - len(self._text.lstrip(plain(chars))), size)

  def rstrip(self, chars: Any = None) -> UntrustedStr:  # noqa: D102
    return self._cut(0, len(self._text.rstrip(plain(chars))))

  def split(self, sep: Any = None, maxsplit: Any = -1) -> list[Any]:  # noqa: D102
    return self._pieces(self._text.split(plain(sep), maxsplit))

  def rsplit(self, sep: Any = None, maxsplit: Any = -1) -> list[Any]:  # noqa: D102
    return self._pieces(self._text.rsplit(plain(sep), maxsplit))

  def splitlines(self, keepends: Any = False) -> list[Any]:  # noqa: D102
    return self._pieces(self._text.splitlines(keepends))

  def partition(self, sep: Any) -> Any:  # noqa: D102
    return tuple(self._pieces(list(self._text.partition(plain(sep)))))

  def rpartition(self, sep: Any) -> Any:  # noqa: D102
    return tuple(self._pieces(list(self._text.rpartition(plain(sep)))))

  def removeprefix(self, prefix: str, /) -> UntrustedStr:  # noqa: D102
    return self._cut(len(plain(prefix)) if self.startswith(prefix) else 0, len(self._text))

  def removesuffix(self, suffix: str, /) -> UntrustedStr:  # noqa: D102
    size = len(self._text)
    return self._cut(0, size - len(plain(suffix)) if self.endswith(suffix) else size)

  def __getitem__(self, key: Any) -> UntrustedStr:
    if isinstance(key, slice):
      start, stop, step = key.indices(len(self))
      if step != 1:
        raise TypeError("a message is cut, not reordered")
      return self._cut(start, stop)
    at = range(len(self))[key]
    return self._cut(at, at + 1)

  def __iter__(self) -> Iterator[Any]:
    return (self[at] for at in range(len(self)))

  def __add__(self, other: str) -> UntrustedStr:
    return UntrustedStr([*self._runs, *_runs_of(other)], self._known)

  def __radd__(self, other: str) -> UntrustedStr:
    return UntrustedStr([*_runs_of(other), *self._runs], self._known)

  def __str__(self) -> UntrustedStr:
    return self

  def __repr__(self) -> UntrustedStr:
    # As Python writes it in a list or a dict; quotes and escapes are of who said it.
    owner = next((owner for _, owner in self._runs if owner is not None), None)
    return UntrustedStr([(repr(self._text), owner)], self._known)

  def __len__(self) -> int:
    return len(self._text)

  def __contains__(self, other: object) -> bool:
    return plain(other) in self._text

  def __eq__(self, other: object) -> bool:
    return self._text == plain(other)

  def __ne__(self, other: object) -> bool:
    return not self == other

  def __hash__(self) -> int:
    return hash(self._text)


def split_by_owner(written: str, known: Sequence[OwnedText]) -> list[OwnedText]:
  """Returns what a template wrote as runs, users' text in the place of marks."""
  pieces = MARK.split(written)
  return [
    known[int(piece)] if at % 2 else (piece, None) for at, piece in enumerate(pieces) if piece
  ]


def map_pieces(marked: UntrustedStr, change: Callable[[str], str]) -> UntrustedStr:
  """Returns it with every piece changed, whose they are kept."""
  return UntrustedStr([(change(text), owner) for text, owner in marked._runs], marked._known)


def _runs_of(text: str) -> tuple[OwnedText, ...]:
  return text._runs if isinstance(text, UntrustedStr) else ((text, None),)


def plain(text: Any) -> Any:
  """Returns the text of what was said; anything else as it is."""
  return text._text if isinstance(text, UntrustedStr) else text


def _asks(name: str) -> Callable[..., Any]:
  return lambda self, *args: getattr(self._text, name)(*map(plain, args))


def _refuses(name: str) -> Callable[..., Any]:
  def refuse(self: UntrustedStr, *args: Any, **kwargs: Any) -> Any:
    if name in _SPELLING and all(owner is None or owner[0] < 0 for _, owner in self._runs):
      return map_pieces(self, lambda text: getattr(text, name)(*map(plain, args), **kwargs))
    raise ValueError(f"{name} would change what a message says")

  return refuse


_SPELLING = {"upper", "lower", "capitalize", "title", "replace"}
_ASKING = {"startswith", "endswith", "find", "rfind", "index", "rindex", "count"}
for _name in dir(str):
  if _name in _ASKING or _name.startswith("is"):
    setattr(UntrustedStr, _name, _asks(_name))
  elif not _name.startswith("_") and _name not in vars(UntrustedStr):
    setattr(UntrustedStr, _name, _refuses(_name))
