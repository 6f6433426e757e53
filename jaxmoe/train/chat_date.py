"""The date of a run's chats, settled when it is made: some chat templates write it."""

from __future__ import annotations

import dataclasses
import datetime
import os
from typing import Any

from jaxmoe.data.format_selection import tokenizer_template
from jaxmoe.train.experiment import Experiment


def settle_chat_date(experiment: Experiment, begun: Any = None) -> Experiment:
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


def _tokenizer_path(experiment: Experiment) -> str:
  return getattr(experiment.data.tokenizer, "path", "")
