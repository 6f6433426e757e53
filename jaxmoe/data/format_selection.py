"""The chat format of a recipe: its own, its tokenizer's template, or the plain one."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.data.chat_format import ChatFormat, PlainChatFormat
from jaxmoe.data.chat_template import ChatTemplate
from jaxmoe.data.mixture import Data
from jaxmoe.data.tokenizers.template_file import TemplateText, find_template
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile


def select_format(data: Data) -> ChatFormat:
  """Returns `data.chat`; else the template of the tokenizer, else `PlainChatFormat()`.

  Files that cannot be read are told when the first conversation is written.
  """
  if data.chat is not None:
    return data.chat
  try:
    found = tokenizer_template(data)
  except InputError as error:
    return _UnreadableFormat(error)
  return PlainChatFormat() if found is None else ChatTemplate(found, _on(data.chat_date))


def describe_format(data: Data) -> str:
  """Returns a line that says in which format the conversations of a recipe are written."""
  form = select_format(data)
  if data.chat is not None:
    return f"chats are written with {form.name}, as the recipe has it"
  if isinstance(form, PlainChatFormat):
    return f"chats are written with {form.name}: the tokenizer has no chat template"
  dated = f", of {data.chat_date}" if data.chat_date else ""
  return f"chats are written by {form.name}{dated}"


def tokenizer_template(data: Data) -> TemplateText | None:
  """Returns the template that came with the tokenizer of a recipe, None where there is none.

  Raises:
    InputError: the tokenizer is gone, or a file beside it cannot be read.
  """
  if not isinstance(data.tokenizer, TokenizerFile):
    return None
  path = data.tokenizer.path
  if not os.path.isfile(path):
    raise InputError(f"{path}: no such file, which may have a chat template; restore the file")
  return find_template(os.path.dirname(path))


def _on(date: str | None) -> Callable[[str], str]:
  """Returns what gives a day, in place of the clock: a run must not depend on when it goes on."""

  def now(form: str) -> str:
    if date is None:
      raise InputError(
        "the chat template writes the date, and the recipe has none; set "
        "--config.data.chat_date=YEAR-MONTH-DAY"
      )
    return datetime.datetime.fromisoformat(date).strftime(form)

  return now


class _UnreadableFormat:
  """Stands for a format that cannot be read, and says so to whoever needs it."""

  def __init__(self, error: InputError):
    self._error = error

  def __getattr__(self, name: str) -> Any:
    raise self._error
