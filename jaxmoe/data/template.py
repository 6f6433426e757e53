"""A chat as the model was trained on it: the template that came with its tokenizer, in a sandbox.

Templates are Jinja programs from strangers. They run where they can change nothing and reach no
attribute that is not plain data. They may ask what users write, trim it and take it apart, but what
they put down is a mark for it: the text of a template may spell special tokens, a message never
does.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.said import Run, Said, parts_of
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
  known: list[Run] = []
  said = [
    {"role": role, "content": Said([(content, at)], known)}
    for at, (role, content) in enumerate(messages)
  ]
  parts = parts_of(_render(template, said, tokens), known)
  written = {message for _, message in parts}
  for at, (_, content) in enumerate(messages):
    if content.strip() and at not in written:
      raise InputError(f"the chat template does not write message {at + 1}; use --prompt")
  return tokenizer.encode_parts([(text, message is None) for text, message in parts])


def _render(template: str, messages: list[dict[str, str]], tokens: Mapping[str, Any]) -> str:
  try:
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError:
    raise InputError("--chat needs jinja2; pip install 'jaxmoe[chat]'") from None

  class Generation(Extension):
    """What stands in it the assistant wrote, for those who train on that alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  def refuse(why: str) -> None:
    raise TemplateError(why)

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
  )
  environment.globals["raise_exception"] = refuse
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  try:
    return environment.from_string(template).render(
      messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens
    )
  except Exception as error:  # a template is a program: it may raise anything
    line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise InputError(f"the chat template fails ({line}); use --prompt without --chat") from None
