"""A chat as the model was trained on it: the template that came with its tokenizer, in a sandbox.

Templates are Jinja programs from strangers. They run where they can change nothing and reach no
attribute that is not plain data. They never see what users write, only a mark for it: the text of
a template may spell special tokens, a message never does.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.tokenizers.subword import SubwordTokenizer

Message = tuple[str, str]
"""Role and content."""


def encode_chat(
  template: str, tokenizer: SubwordTokenizer, messages: Sequence[Message],
  tokens: Mapping[str, str | None],
) -> np.ndarray:
  """Returns the int32 ids of a chat up to where the assistant is to write.

  Args:
    template: Jinja, as chat_template.jinja or `chat_template` of tokenizer_config.json has it.
    tokenizer: Of the model.
    messages: In order.
    tokens: What `bos_token` and the like stand for in the template.

  Raises:
    InputError: the extra `chat` is missing, the template fails or refuses the messages, or a
      message is not valid UTF-8.
  """
  marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
  marked = [{"role": role, "content": mark} for (role, _), mark in zip(messages, marks)]
  text = _render(template, marked, tokens)
  ids = []
  for index, (_, content) in enumerate(messages):
    before, mark, text = text.partition(marks[index])
    if not mark or marks[index] in text:
      raise InputError(
        f"the chat template does not write message {index + 1} once and in its place; use --prompt"
      )
    ids += [tokenizer.encode_template(before), tokenizer.encode(content)]
  return np.concatenate([*ids, tokenizer.encode_template(text)]).astype(np.int32)


def _render(template: str, messages: list[dict[str, str]], tokens: Mapping[str, Any]) -> str:
  try:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError:
    raise InputError("--chat needs jinja2; pip install 'jaxmoe[chat]'") from None

  def refuse(why: str) -> None:
    raise TemplateError(why)

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
  )
  environment.globals["raise_exception"] = refuse
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  try:
    return environment.from_string(template).render(
      messages=messages, add_generation_prompt=True, **tokens
    )
  except Exception as error:  # a template is a program: it may raise anything
    line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise InputError(f"the chat template fails ({line}); use --prompt without --chat") from None
