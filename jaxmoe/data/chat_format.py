"""Messages to pieces of text, each learned or not: what an assistant writes is, the rest is read.

Every piece is tokenized by itself, so what is learned begins and ends between two tokens, and a
tokenizer takes every piece as ordinary text: no message can spell a special token.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from jaxmoe.core.config_io import to_plain
from jaxmoe.core.errors import InputError
from jaxmoe.data.message import Conversation, Message, PromptCompletion
from jaxmoe.data.tokenizers.tokenizer import Tokenizer

TextPiece = tuple[str, bool]
"""Text, and whether its tokens are learned."""

EncodedDocument = tuple[np.ndarray, np.ndarray | None]
"""Ids of a document, and which of them and of its end are learned; None for all."""


class ContentWriter(Protocol):
  """How documents that are learned in part become text and ids."""

  def find_error(self, content: Any, tokenizer: Tokenizer | None) -> str:
    """Returns why a document cannot be used, or ''."""

  def text(self, content: Any, tokenizer: Tokenizer | None) -> list[TextPiece]:
    """Returns the text, cut where learning starts or ends; special tokens are no text."""

  def encode(self, content: Any, tokenizer: Tokenizer) -> EncodedDocument:
    """Returns the ids of the document and which of them and of its end are learned."""


class ChatFormat(ContentWriter, Protocol):
  """How conversations become text and ids."""

  @property
  def plain(self) -> Any:
    """All that ids depend on, as JSON has it, but for the date."""

  @property
  def name(self) -> str:
    """What it is, for a person."""


@dataclasses.dataclass(frozen=True)
class PlainChatFormat:
  r"""How the messages of a document become its text.

  Attributes:
    before: Stands before every message; {role} in it is the role, and the name where there is one.
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

  @property
  def plain(self) -> Any:
    """The fields."""
    return to_plain(self, as_before=True)

  @property
  def name(self) -> str:
    """What stands around a message."""
    return f"{self.before!r} before and {self.after!r} after each message (data.chat)"

  def pieces(self, messages: Iterable[tuple[Any, ...]]) -> list[TextPiece]:
    """Returns the text of the document, cut where learning starts or ends and at every message."""
    pieces = []
    for message in (Message(*message) for message in messages):
      learned = self._learns(message)
      name = (message.more or {}).get("name")
      shown = f"{message.role} {name}" if name else message.role
      pieces.append((self.before.replace("{role}", shown), False))
      pieces += [(text, learned) for text in (message.content or "", self.after) if text]
    return pieces

  def prompt(self, messages: Iterable[tuple[Any, ...]], tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids of messages up to where the first of `answers` is to write."""
    texts = [text for text, _ in self.pieces(messages)]
    texts.append(self.before.replace("{role}", self.answers[0]))
    start = np.array([tokenizer.start_id], np.int32)
    return np.concatenate([start, *map(tokenizer.encode, texts)])

  def text(self, content: Conversation, tokenizer: Tokenizer | None) -> list[TextPiece]:
    """Returns the text of the document, cut where learning starts or ends."""
    return self.pieces(content.messages)

  def encode(self, content: Conversation, tokenizer: Tokenizer) -> EncodedDocument:
    """Returns ids and which are learned; the end is where the last message is."""
    return encode_pieces(
      self.pieces(content.messages), self._learns(content.messages[-1]), tokenizer
    )

  def find_error(self, content: Conversation, tokenizer: Tokenizer | None) -> str:
    """Returns why the messages cannot be used, or ''."""
    if content.tools is not None:
      return "'tools', for which only a chat template has a place"
    for message in content.messages:
      for field, value in (message.more or {}).items():
        # It is written beside the role, so it must not be able to look like the rest of that.
        if field == "name" and not re.fullmatch(r"[\w .'-]+", value):
          return "a name that is more than words"
        if field not in ("name", "tool_call_id"):
          return f"{field!r}, for which only a chat template has a place"
    return unlearnable_error(content, self._learns)

  def _learns(self, message: Message) -> bool:
    return message.role in self.answers if message.learned is None else message.learned


def unlearnable_error(content: Conversation, learns: Any) -> str:
  """Returns the error of messages that say nothing, or nothing that `learns` holds for, or ''."""
  speaking = [message for message in content.messages if (message.content or "").strip()]
  speaking += [message for message in content.messages if message.more and not message.content]
  if not speaking:
    return "an empty document"
  return "" if any(map(learns, speaking)) else "no answer to learn from"


class CompletionWriter:
  """Writes a text and what follows it, which is learned with the end; nothing is between."""

  def find_error(self, content: PromptCompletion, tokenizer: Tokenizer | None) -> str:
    """Returns why they cannot be used, or ''."""
    if content.completion.strip():
      return ""
    return "no answer to learn from" if content.prompt.strip() else "an empty document"

  def text(self, content: PromptCompletion, tokenizer: Tokenizer | None) -> list[TextPiece]:
    """Returns both."""
    both = ((content.prompt, False), (content.completion, True))
    return [(text, learned) for text, learned in both if text]

  def encode(self, content: PromptCompletion, tokenizer: Tokenizer) -> EncodedDocument:
    """Returns ids and which are learned."""
    return encode_pieces(self.text(content, tokenizer), True, tokenizer)


def writer_for(content: Conversation | PromptCompletion, chat: ChatFormat) -> ContentWriter:
  """Returns what writes a document: `chat` does what has roles."""
  return chat if isinstance(content, Conversation) else CompletionWriter()


def encode_pieces(pieces: list[TextPiece], ends: bool, tokenizer: Tokenizer) -> EncodedDocument:
  """Returns the ids of pieces, each tokenized by itself, and which of them and the end count."""
  encoded = [(tokenizer.encode(text), learned) for text, learned in pieces]
  flags = [np.full(len(ids), learned) for ids, learned in encoded]
  return np.concatenate([ids for ids, _ in encoded]), np.concatenate([*flags, [ends]])
