"""The table of a run's pipeline, held by its recipe: its file may move or change."""

from __future__ import annotations

import dataclasses

from jaxmoe.parallel.pipelines import own_table, write_table
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.pipeline_stages import vocabulary_of


def hold_table(experiment: Experiment) -> Experiment:
  """Returns a recipe with the table of its pipeline in the place of the name of its file.

  So config.json is enough to go on, and a table that was edited meanwhile is another recipe.

  Raises:
    InputError: There is no such file, or no table in it.
  """
  parallel = experiment.parallel
  if not parallel.pipeline.endswith(".csv"):
    return experiment
  table = own_table(parallel.pipeline, vocabulary_of(parallel))
  assert table is not None
  held = dataclasses.replace(parallel, pipeline=write_table(table))
  return dataclasses.replace(experiment, parallel=held)


def changed_table(old: Experiment, new: Experiment) -> str:
  """Returns what to say where a run goes on by another table of its own; '' where it does not."""
  before, now = old.parallel.pipeline, new.parallel.pipeline
  if before == now or "\n" not in before + now:
    return ""
  return "the pipeline goes by another table than the run had"
