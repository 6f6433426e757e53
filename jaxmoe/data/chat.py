"""Messages to pieces of text, each learned or not: what an assistant writes is, the rest is read.

Every piece is tokenized by itself, so what is learned begins and ends between two tokens, and a
tokenizer takes every piece as ordinary text: no message can spell a special token.
"""

from __future__ import annotations

import dataclasses

from jaxmoe.core.errors import InputError
from jaxmoe.data.entry import Messages

Piece = tuple[str, bool]
"""Text, and whether its tokens are learned."""


@dataclasses.dataclass(frozen=True)
class Chat:
  r"""How the messages of a document become its text.

  Attributes:
    before: Stands before every message; {role} in it is the role.
    after: Stands after every message. After an answer it is learned, so that a model that has
      answered stops.
    answers: The roles whose messages are learned.
  """

  before: str = "<|{role}|>\n"
  after: str = "\n"
  answers: tuple[str, ...] = ("assistant",)

  def __post_init__(self) -> None:
    if "{role}" not in self.before:
      raise InputError(f"before must contain {{role}}, or roles look alike: before={self.before!r}")
    if not self.answers:
      raise InputError("answers is empty: nothing would be learned; name a role, such as assistant")

  def pieces(self, messages: Messages) -> list[Piece]:
    """Returns the text of the document, cut where learning starts or ends and at every message."""
    pieces = []
    for role, content in messages:
      learned = role in self.answers
      pieces.append((self.before.replace("{role}", role), False))
      pieces += [(text, learned) for text in (content, self.after) if text]
    return pieces

  def ends_in_answer(self, messages: Messages) -> bool:
    """Whether the last message is an answer, so that the end of the document is learned too."""
    return messages[-1][0] in self.answers

  def flaw(self, messages: Messages) -> str:
    """Returns why the messages cannot be used, or ''."""
    if not any(content.strip() for _, content in messages):
      return "an empty document"
    if not any(content.strip() for role, content in messages if role in self.answers):
      return "no answer to learn from"
    return ""
