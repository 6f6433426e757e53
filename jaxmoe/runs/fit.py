"""Training as a function: what is checked before, and a run from its recipe to its last step."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from jaxmoe.core import multihost
from jaxmoe.data.corpus import open_corpus
from jaxmoe.optim import make_schedule
from jaxmoe.parallel import make_layout
from jaxmoe.parity import check_proven
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.idle_devices import idle_devices
from jaxmoe.train.run_options import RunOptions, RunResult
from jaxmoe.train.trainer import Trainer
from jaxmoe.train.workdir import Workdir


def check_run(
  experiment: Experiment, workdir: Workdir, allow_unproven: bool, say: Callable[[str], None]
) -> None:
  """Returns if a recipe may train in a workdir; writes nothing.

  Args:
    experiment: The recipe.
    workdir: The run.
    allow_unproven: Whether a layout need not have been shown equal to one device.
    say: Called with what is worth knowing.

  Raises:
    InputError: it may not.
  """
  if multihost.is_main_process():
    workdir.check(experiment)
  for warning in [] if allow_unproven else check_proven(experiment):
    say(f"note: {warning}")
  # Its checks, before anything is read.
  make_schedule(experiment.optim, experiment.train.num_steps)


def train_run(
  experiment: Experiment,
  workdir: Workdir,
  options: RunOptions,
  stopped: Callable[[], bool],
  tokenizers: pathlib.Path | None,
  say: Callable[[str], None],
) -> RunResult:
  """Starts a checked run or goes on with it, and returns where it stands.

  Args:
    experiment: The recipe.
    workdir: The run.
    options: What it is given besides.
    stopped: Asked before every step.
    tokenizers: The folder of trained tokenizers; None keeps none.
    say: Called with what is worth knowing.

  Raises:
    UserFacingError: as `Trainer.fit`.
  """
  layout = make_layout(experiment.parallel)
  if idle := idle_devices(experiment, layout, jax.devices()):
    say(f"note: {idle}")
  with multihost.raise_on_all():
    corpus = open_corpus(experiment.data, tokenizers, progress=say)
  multihost.assert_equal("the text", json.dumps(corpus.identity))
  return Trainer(experiment, workdir, corpus, layout, options).fit(stopped)


class StepCallback:
  """Calls a function with the line of metrics.jsonl of every step."""

  def __init__(self, on_step: Callable[[dict[str, Any]], Any]):
    self._on_step = on_step

  def __call__(self, line: dict[str, Any]) -> None:
    """Takes the line of a step."""
    self._on_step(line)

  def rollback(self, step: int) -> None:
    """Does nothing: lines after `step` come again."""
