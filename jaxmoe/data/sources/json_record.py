"""A record of a file of records: its content, or why it cannot be used.

A record has one of three fields, whatever else it has: `text`, a string; `tokens`, ids made by the
tokenizer of the recipe; `messages`, a list of objects with a `role` and a `content`, of which the
answers are learned (see `PlainChatFormat`). One that has none of them may have `conversations`,
messages as ShareGPT has them, or a `prompt` and its `completion`, which is learned. Strings may be
given as UTF-8 bytes, as columnar files hold them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxmoe.data.raw_example import INVALID_UTF8, Content, RawExample
from jaxmoe.data.sources.conversation import (
  OF_RECORD,
  WRONG_FIELDS,
  RecordError,
  completion,
  conversation,
  text_of,
)

FIELDS = ("text", "tokens", "messages")
BESIDE = {"conversations": ("conversations",), "prompt": ("prompt", "completion")}
"""What may stand in the place of those, by the first of its fields."""

_INT32_MAX = 2**31 - 1


def record_content(record: Any) -> tuple[Content | None, str]:
  """Returns (content, '') or (None, why) of a record, a dict if all is well."""
  found = content_field(record) if isinstance(record, dict) else None
  if found is None:
    return None, WRONG_FIELDS
  try:
    return _content(found, record), ""
  except UnicodeError:
    return None, INVALID_UTF8
  except RecordError as why:
    return None, str(why)


def content_field(names: Iterable[str]) -> str | None:
  """Returns the field of `names` that holds the content; None if there are none or several.

  Of a prompt and its completion it is the prompt.
  """
  names = set(names)
  found = [name for name in FIELDS if name in names]
  if not found:
    found = [name for name, fields in BESIDE.items() if names.issuperset(fields)]
  return found[0] if len(found) == 1 else None


def fields_of(names: Iterable[str]) -> list[str]:
  """Returns the fields of `names` that a record is read from, the one with the content first."""
  names = list(names)
  found = content_field(names)
  if found is None:
    return []
  beside = () if found in ("text", "tokens") else ("completion", "tools", "system", *OF_RECORD)
  return [found, *(name for name in beside if name in names)]


def record_example(
  place: str, name: str, content: Content | None, why: str, locator: Any = None
) -> RawExample:
  """Returns the example of a record; equal contents are on one side of the split."""
  if content is None:
    return RawExample(place, name, name, name, error=why)
  if isinstance(content, np.ndarray):
    raw = content.tobytes()
  else:
    raw = (content if isinstance(content, str) else content.line).encode("utf-8")
  key = hashlib.sha256(raw).hexdigest()
  return RawExample(place, name, key, key, content, locator=locator)


def _content(field: str, record: Mapping[str, Any]) -> Content:
  if field == "text":
    return text_of(record[field])
  if field == "tokens":
    return _tokens(record[field])
  return completion(record) if field == "prompt" else conversation(record[field], record)


def _tokens(value: Any) -> np.ndarray:
  if isinstance(value, list) and all(type(token) is int for token in value):
    lowest, highest = min(value, default=0), max(value, default=0)
  elif isinstance(value, np.ndarray) and value.dtype.kind in "iu":
    lowest, highest = (value.min(), value.max()) if value.size else (0, 0)
  else:
    raise RecordError(WRONG_FIELDS)
  if lowest < 0 or highest > _INT32_MAX:
    raise RecordError("an id out of the vocabulary")
  return np.array(value, np.int32)
