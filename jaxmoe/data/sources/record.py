"""A record of a file of records: its content, or why it cannot be used.

A record has one of three fields, whatever else it has: `text`, a string; `tokens`, ids made by the
tokenizer of the recipe; `messages`, a list of objects with a `role` and a `content`, of which the
answers are learned (see `Chat`). Strings may be given as UTF-8 bytes, as columnar files hold them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxmoe.data.entry import INVALID_UTF8, Content, Entry

FIELDS = ("text", "tokens", "messages")
WRONG_FIELDS = (
  "not one of 'text' (a string), 'tokens' (a list of ids) and 'messages' (a list of objects with "
  "'role' and 'content')"
)
_INT32_MAX = 2**31 - 1


def record_content(record: Any) -> tuple[Content | None, str]:
  """Returns (content, '') or (None, flaw) of a record, a dict if all is well."""
  found = one_field(record) if isinstance(record, dict) else None
  if found is None:
    return None, WRONG_FIELDS
  try:
    return _PARSERS[found](record[found]), ""
  except UnicodeError:
    return None, INVALID_UTF8
  except _Flaw as flaw:
    return None, str(flaw)


def one_field(names: Iterable[str]) -> str | None:
  """Returns the one field of `names` that holds the content; None if there are none or several."""
  found = [name for name in names if name in FIELDS]
  return found[0] if len(found) == 1 else None


def record_entry(
  place: str, name: str, content: Content | None, flaw: str, locator: Any = None
) -> Entry:
  """Returns the entry of a record; equal contents are on one side of the split."""
  if content is None:
    return Entry(place, name, name, name, flaw=flaw)
  if isinstance(content, str):
    raw = content.encode("utf-8")
  elif isinstance(content, tuple):
    raw = json.dumps(content).encode("utf-8")
  else:
    raw = content.tobytes()
  key = hashlib.sha256(raw).hexdigest()
  return Entry(place, name, key, key, content, locator=locator)


class _Flaw(Exception):
  """Why a value cannot be used."""


def _text(value: Any) -> str:
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if not isinstance(value, str):
    raise _Flaw(WRONG_FIELDS)
  value.encode("utf-8")  # fails for an escape such as \ud800, which no file could hold
  return value


def _tokens(value: Any) -> np.ndarray:
  if isinstance(value, list) and all(type(token) is int for token in value):
    lowest, highest = min(value, default=0), max(value, default=0)
  elif isinstance(value, np.ndarray) and value.dtype.kind in "iu":
    lowest, highest = (value.min(), value.max()) if value.size else (0, 0)
  else:
    raise _Flaw(WRONG_FIELDS)
  if lowest < 0 or highest > _INT32_MAX:
    raise _Flaw("an id out of the vocabulary")
  return np.array(value, np.int32)


def _messages(value: Any) -> Content:
  if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
    raise _Flaw(WRONG_FIELDS)
  if not value:
    raise _Flaw("an empty document")
  return tuple((_role(message.get("role")), _text(message.get("content"))) for message in value)


def _role(value: Any) -> str:
  role = _text(value)
  # A role is written into the template, so it must not be able to look like the rest of one.
  if not role.isascii() or not role.replace("-", "_").isidentifier():
    raise _Flaw("a role that is not a word")
  return role


_PARSERS: dict[str, Callable[[Any], Content]] = {
  "text": _text,
  "tokens": _tokens,
  "messages": _messages,
}
