"""Chat messages: who said what, and which of it is learned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

TOOL_CALLS = "tool_calls"
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message brings what was thought before it was said."""

MORE = ("name", TOOL_CALLS, "tool_call_id", *REASONING)
"""Fields of a message beside its role and content that a chat template may write."""


class Message(NamedTuple):
  """One message.

  Attributes:
    role: A word.
    content: Its text; None where it has none, as a call of a tool may.
    learned: Whether it is learned; None for as its role says.
    more: Those of `MORE` that it has, as JSON has them.
  """

  role: str
  content: str | None
  learned: bool | None = None
  more: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Messages, at least one, and the tools that may be called in them, as JSON has them."""

  messages: tuple[Message, ...]
  tools: Any = None

  def __iter__(self) -> Iterator[Message]:
    return iter(self.messages)

  @property
  def line(self) -> str:
    """JSON that tells it from others: pairs of role and content where there is no more to it."""
    whole = [list(message) for message in self.messages]
    plain = self.tools is None and all(rest == [None, None] for _, _, *rest in whole)
    return json.dumps([pair[:2] for pair in whole] if plain else [whole, self.tools])


@dataclasses.dataclass(frozen=True)
class PromptCompletion:
  """A text, and what is learned to follow it; no roles, and no format around them."""

  prompt: str
  completion: str

  @property
  def line(self) -> str:
    """JSON that tells it from others, conversations too."""
    return json.dumps({"prompt": self.prompt, "completion": self.completion})
