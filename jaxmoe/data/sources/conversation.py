"""Conversations as public data sets hold them, or why they cannot be used.

A message has a role and a content, a string or a list of text parts. `weight` (0 or 1) and `train`
say whether it is learned; name, tool calls and reasoning are kept for a chat template. What would
change what is learned and cannot be kept, such as an image, is an error with its name. Fields that
nobody here knows are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxmoe.data.message import MORE, REASONING, TOOL_CALLS, Conversation, Message, PromptCompletion

WRONG_FIELDS = (
  "not one of 'text' (a string), 'tokens' (a list of ids) and 'messages' (a list of objects with "
  "'role' and 'content')"
)
OF_MESSAGE = ("images", "image", "audio", "audios", "videos", "video", "function_call")
OF_RECORD = (*OF_MESSAGE[:-1], "functions", "chat_template_kwargs")
"""Fields that change what is learned and are not kept: a record that has one is not used."""

ROLES = {
  "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
  "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool",
  "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""Roles by their names in ShareGPT's `from`."""


class RecordError(Exception):
  """Why a value cannot be used."""


def text_of(value: Any) -> str:
  """Returns a string, which may be given as UTF-8 bytes."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if not isinstance(value, str):
    raise RecordError(WRONG_FIELDS)
  value.encode("utf-8")  # fails for an escape such as \ud800, which no file could hold
  return value


def conversation(value: Any, record: Mapping[str, Any]) -> Conversation:
  """Returns the messages of a record, under whatever name they came."""
  _refuse(record, OF_RECORD, "a record")
  messages = _messages(value)
  if record.get("system") and "conversations" in record and "messages" not in record:
    messages = (Message("system", text_of(record["system"])), *messages)
  if not messages:
    raise RecordError("an empty document")
  return Conversation(messages, _json(record.get("tools"), "tools"))


def completion(record: Mapping[str, Any]) -> Conversation | PromptCompletion:
  """Returns what follows a prompt: both are strings, or both are messages."""
  prompt, after = record["prompt"], record["completion"]
  if isinstance(prompt, list) and isinstance(after, list):
    before = tuple(message._replace(learned=False) for message in _messages(prompt))
    messages = (*before, *_messages(after))
    if not messages:
      raise RecordError("an empty document")
    _refuse(record, OF_RECORD, "a record")
    return Conversation(messages, _json(record.get("tools"), "tools"))
  if isinstance(prompt, list) or isinstance(after, list):
    raise RecordError(
      "'prompt' and 'completion' that are not both strings or both lists of messages"
    )
  return PromptCompletion(text_of(prompt), text_of(after))


def _messages(value: Any) -> tuple[Message, ...]:
  if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
    raise RecordError(WRONG_FIELDS)
  return tuple(map(_message, value))


def _message(plain: Mapping[str, Any]) -> Message:
  if plain.get("from") is not None and plain.get("role") is None:
    role = ROLES.get(text_of(plain["from"]))
    if role is None:
      raise RecordError(f"a 'from' that is none of {', '.join(ROLES)}")
    plain = {**plain, "role": role, "content": plain.get("value")}
  _refuse(plain, OF_MESSAGE, "a message")
  more = {name: _kept(plain[name], name) for name in MORE if _has(plain, name)}
  content = plain.get("content")
  if content is None and not any(name in more for name in (TOOL_CALLS, *REASONING)):
    raise RecordError(WRONG_FIELDS)
  shown = None if content is None else _content(content)
  return Message(_role(plain.get("role")), shown, _learned(plain), more or None)


def _refuse(plain: Mapping[str, Any], names: tuple[str, ...], what: str) -> None:
  for name in names:
    if _has(plain, name):
      raise RecordError(f"{what} with {name!r}, which cannot be learned from")


def _has(plain: Mapping[str, Any], name: str) -> bool:
  value = plain.get(name)
  return value is not None and not (isinstance(value, (str, bytes, list, dict)) and not value)


def _role(value: Any) -> str:
  role = text_of(value)
  # A role is written into the template, so it must not be able to look like the rest of one.
  if not role.isascii() or not role.replace("-", "_").isidentifier():
    raise RecordError("a role that is not a word")
  return role


def _content(value: Any) -> str:
  if not isinstance(value, list):
    return text_of(value)
  texts = []
  for part in value:
    if not isinstance(part, dict):
      raise RecordError(WRONG_FIELDS)
    kind = text_of(part.get("type"))
    if kind not in ("text", "input_text", "output_text"):
      raise RecordError(f"a part of the type {kind[:20]!r}, which cannot be learned from")
    texts.append(text_of(part.get("text")))
  return "".join(texts)


def _learned(plain: Mapping[str, Any]) -> bool | None:
  weight, train = plain.get("weight"), plain.get("train")
  if weight is not None and (not isinstance(weight, (int, float)) or weight not in (0, 1)):
    raise RecordError("a 'weight' that is neither 0 nor 1")
  if train is not None and not isinstance(train, bool):
    raise RecordError("a 'train' that is neither true nor false")
  if train is not None and weight is not None and train != bool(weight):
    raise RecordError("a 'weight' and a 'train' that disagree")
  if train is not None:
    return train
  return False if weight == 0 else None  # a weight of 1 is what every message has


def _kept(value: Any, name: str) -> Any:
  if name == TOOL_CALLS:
    return _json(value, name)
  return text_of(value)


def _json(value: Any, name: str) -> Any:
  """Returns a list of objects, which may be given as JSON text; None where there are none."""
  if isinstance(value, (str, bytes)):
    try:
      value = json.loads(value or "null")
    except (ValueError, RecursionError):
      raise RecordError(f"a {name!r} that is not JSON") from None
  if not value:
    return None
  if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
    raise RecordError(f"a {name!r} that is not a list of objects")
  return [_plain(item, name) for item in value]


def _plain(value: Any, name: str) -> Any:
  if isinstance(value, dict):
    return {text_of(key): _plain(item, name) for key, item in value.items()}
  if isinstance(value, list):
    return [_plain(item, name) for item in value]
  if value is None or isinstance(value, (bool, int, float)):
    return value
  if not isinstance(value, (str, bytes)):
    raise RecordError(f"a {name!r} that is not JSON")
  return text_of(value)
