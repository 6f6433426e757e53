"""The chat format that a run is asked in: the one it is trained in."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from jaxmoe.conversion.hf_files import TOKENIZER
from jaxmoe.core.errors import InputError
from jaxmoe.data.chat_format import PlainChatFormat
from jaxmoe.data.chat_template import encode_chat
from jaxmoe.data.format_selection import select_format, tokenizer_template
from jaxmoe.data.tokenizers import Tokenizer
from jaxmoe.data.tokenizers.subword import SubwordTokenizer
from jaxmoe.data.tokenizers.template_file import TemplateText, find_template
from jaxmoe.train.experiment import Experiment

Messages = Sequence[tuple[str, str]]
"""(role, content) of each message."""


@dataclasses.dataclass(frozen=True)
class PromptFormat:
  """A format that a model is asked in.

  Attributes:
    name: For a person.
    encode: Returns the ids of messages up to where the assistant is to write.
  """

  name: str
  encode: Callable[[Tokenizer, Messages], np.ndarray]


def prompt_format(carried: pathlib.Path, experiment: Experiment, trained: bool) -> PromptFormat:
  """Returns the format that a run is asked in: the one it is trained in.

  Args:
    carried: The folder of files that came with the model; may not exist.
    experiment: Its recipe.
    trained: Whether it was trained here; else it is asked in the template that came with it.

  Raises:
    InputError: it is to be the template, and there is none.
  """
  beside = find_template(carried)
  if (carried / TOKENIZER).is_file() and not trained:
    if beside is None:
      raise InputError(
        f"{carried}: no chat template came with the model; use --prompt without --chat"
      )
    return _by(beside)
  if experiment.data.chat is None and beside is not None:
    return _by(beside)
  form = select_format(experiment.data)
  if isinstance(form, PlainChatFormat):
    return PromptFormat(form.name, lambda tokenizer, content: form.prompt(content, tokenizer))
  found = tokenizer_template(experiment.data)
  assert found is not None
  return _by(found)


def _by(template: TemplateText) -> PromptFormat:
  def encode(tokenizer: Tokenizer, content: Messages) -> np.ndarray:
    if not isinstance(tokenizer, SubwordTokenizer):
      raise InputError("--chat needs the tokenizer that the model came with; use --prompt alone")
    return encode_chat(template.text, tokenizer, content, template.tokens)

  return PromptFormat(f"the template of {template.path}", encode)
