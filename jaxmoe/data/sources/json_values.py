"""The JSON values of a text: those of an array, or of values that follow each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Value = tuple[Any, int, int]
"""A value, and where it starts and ends in the text."""

_BLANK = " \t\r\n"
_DECODER = json.JSONDecoder()


class NotJson(ValueError):
  """Why a text is no JSON from some place on."""


def json_values(text: str) -> Iterator[Value]:
  """Yields the values of an array, or those of a text of values, until one is damaged.

  Raises:
    NotJson: what follows is none, or the array does not end.
  """
  at = _skip(text, 0)
  in_array = text.startswith("[", at)
  at = _skip(text, at + 1) if in_array else at
  while at < len(text) and not (in_array and text[at] == "]"):
    start = at
    value, at = _value(text, start)
    yield value, start, at
    at = _skip(text, at)
    if in_array and text[at : at + 1] not in (",", "]", ""):
      raise NotJson(f"not JSON behind character {at}")
    at = _skip(text, at + 1) if in_array and text.startswith(",", at) else at
  if in_array and at == len(text):
    raise NotJson("ends early: its array has no end")
  if in_array and _skip(text, at + 1) < len(text):
    raise NotJson(f"not JSON behind character {at}: its array has ended")


def is_object(line: str | bytes) -> bool:
  """Whether a line is an object by itself."""
  try:
    return isinstance(json.loads(line), dict)
  except (ValueError, RecursionError):
    return False


def is_lines(text: str) -> bool:
  """Whether a text that begins with no object on a line is lines all the same: a damaged first."""
  at = _skip(text, 0)
  lines = [line for line in text.split("\n", 64)[:64] if line.strip(_BLANK)]
  if not text.startswith("{", at) or len(lines) < 2:
    return False
  try:
    _value(text, at)
  except NotJson:
    return is_object(lines[1])
  return False


def _value(text: str, at: int) -> tuple[Any, int]:
  try:
    return _DECODER.raw_decode(text, at)
  except (ValueError, RecursionError):
    raise NotJson(f"not JSON behind character {at}") from None


def _skip(text: str, at: int) -> int:
  while at < len(text) and text[at] in _BLANK:
    at += 1
  return at
