"""Which format the conversations of a recipe are written in."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.data.chat_format import Chat, Format
from jaxmoe.data.chat_template import Template
from jaxmoe.data.mixture import Data
from jaxmoe.data.tokenizers.template_file import TemplateText, template_beside
from jaxmoe.data.tokenizers.tokenizer_file import File


def format_of(data: Data) -> Format:
  """Returns `data.chat`; where it is None the template of the tokenizer, else that of `Chat()`.

  Files that cannot be read are told when the first conversation is written.
  """
  if data.chat is not None:
    return data.chat
  try:
    found = template_of(data)
  except InputError as error:
    return _Lost(error)
  return Chat() if found is None else Template(found, _on(data.chat_date))


def written_as(data: Data) -> str:
  """Returns a line that says in which format the conversations of a recipe are written."""
  form = format_of(data)
  if data.chat is not None:
    return f"chats are written with {form.name}, as the recipe has it"
  if isinstance(form, Chat):
    return f"chats are written with {form.name}: the tokenizer has no chat template"
  dated = f", of {data.chat_date}" if data.chat_date else ""
  return f"chats are written by {form.name}{dated}"


def template_of(data: Data) -> TemplateText | None:
  """Returns the template that came with the tokenizer of a recipe, None where there is none.

  Raises:
    InputError: the tokenizer is gone, or a file beside it cannot be read.
  """
  if not isinstance(data.tokenizer, File):
    return None
  path = data.tokenizer.path
  if not os.path.isfile(path):
    raise InputError(f"{path}: no such file, which may have a chat template; restore the file")
  return template_beside(os.path.dirname(path))


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


class _Lost:
  """Stands for a format that cannot be read, and says so to whoever needs it."""

  def __init__(self, error: InputError):
    self._error = error

  def __getattr__(self, name: str) -> Any:
    raise self._error
