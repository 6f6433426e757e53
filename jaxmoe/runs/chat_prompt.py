"""In which format a run's chats are: settled when it is made, and the one it is asked in."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmoe.checkpoint import OrbaxStore
from jaxmoe.conversion.hf_files import FOLDER, TOKENIZER
from jaxmoe.core.errors import InputError
from jaxmoe.data.chat_format import PlainChatFormat
from jaxmoe.data.chat_template import encode_chat
from jaxmoe.data.format_selection import select_format, tokenizer_template
from jaxmoe.data.tokenizers import Tokenizer
from jaxmoe.data.tokenizers.subword import SubwordTokenizer
from jaxmoe.data.tokenizers.template_file import TemplateText, find_template
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.workdir import Workdir

Said = Sequence[tuple[str, str]]
"""(role, content) of each message."""


@dataclasses.dataclass(frozen=True)
class Asked:
  """A format that a model is asked in.

  Attributes:
    name: For a person.
    encode: Returns the ids of messages up to where the assistant is to write.
  """

  name: str
  encode: Callable[[Tokenizer, Said], np.ndarray]


def settled(experiment: Experiment, begun: Any = None) -> Experiment:
  """Returns a recipe with what is settled when a run is made: the date that its chats are of.

  Args:
    experiment: The recipe.
    begun: What the config.json of the run holds that is to go on, where there is one.
  """
  data, date = experiment.data, experiment.data.chat_date
  if data.chat is not None or date is not None:
    return experiment
  if begun:
    kept = begun.get("data")  # whatever is wrong with it is said when the run is looked at
    date = kept.get("chat_date") if isinstance(kept, dict) else None
  elif asks_the_date(experiment):
    # Not the local day: processes may be in several places.
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
  return dataclasses.replace(experiment, data=dataclasses.replace(data, chat_date=date))


def asks_the_date(experiment: Experiment) -> bool:
  """Whether a recipe's chats are written by a template that asks for the date."""
  if experiment.data.chat is not None or not os.path.isfile(_tokenizer_path(experiment)):
    return False
  found = tokenizer_template(experiment.data)
  return found is not None and found.asks_the_date


def asked_in(workdir: Workdir, experiment: Experiment) -> Asked:
  """Returns the format that a run is asked in: the one it is trained in.

  A model that was converted and not trained since is asked in the template that came with it.

  Raises:
    InputError: it is to be the template, and there is none.
  """
  beside = find_template(workdir.path / FOLDER)
  came_with = (workdir.path / FOLDER / TOKENIZER).is_file()
  if came_with and not any(OrbaxStore(workdir.checkpoints).steps()):
    if beside is None:
      raise InputError(
        f"{workdir.path / FOLDER}: no chat template came with the model; use --prompt without "
        "--chat"
      )
    return _by(beside)
  if experiment.data.chat is None and beside is not None:
    return _by(beside)
  form = select_format(experiment.data)
  if isinstance(form, PlainChatFormat):
    return Asked(form.name, lambda tokenizer, content: form.prompt(content, tokenizer))
  found = tokenizer_template(experiment.data)
  assert found is not None
  return _by(found)


def _by(template: TemplateText) -> Asked:
  def encode(tokenizer: Tokenizer, content: Said) -> np.ndarray:
    if not isinstance(tokenizer, SubwordTokenizer):
      raise InputError("--chat needs the tokenizer that the model came with; use --prompt alone")
    return encode_chat(template.text, tokenizer, content, template.tokens)

  return Asked(f"the template of {template.path}", encode)


def _tokenizer_path(experiment: Experiment) -> str:
  return getattr(experiment.data.tokenizer, "path", "")
