"""Restoring a run from its newest checkpoint: whether it is its own, and what changed since."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxmoe.checkpoint import Store
from jaxmoe.checkpoint.store import read_record
from jaxmoe.core.config_io import diff, from_plain
from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.data.corpus import Corpus
from jaxmoe.models.transformer import Decoder
from jaxmoe.optim import make_schedule
from jaxmoe.train.changed_definitions import mended
from jaxmoe.train.experiment import Experiment, unsafe_changes
from jaxmoe.train.observers import Observers
from jaxmoe.train.train_state import ONLY, State
from jaxmoe.train.workdir import changes_line


def tell_changes(
  observers: Observers, step: int, state: State, record: Mapping[str, Any],
  experiment: Experiment, decoder: Decoder,
) -> None:  # fmt: skip
  """Tells of what goes on otherwise than the checkpoint with `record` would have."""
  update = int(state.step - state.skipped - state.unlabelled)
  rates = redrawn(from_plain(Experiment, record["config"]), experiment, update)
  if rates is not None:
    observers.log.event("learning_rate", step=step, due=rates[0], now=rates[1])
    observers.display.say(rates[2])
  for name, what in mended(record, decoder).items():
    observers.log.event("mended", step=step, definition=name, what=what)
    observers.display.say(f"from step {step} on, {what}")


def tell_recast(observers: Observers, step: int, recast: Mapping[tuple[str, str], int]) -> None:
  """Tells of parameters that a checkpoint has in another dtype than they go on in."""
  for (came, kept), number in recast.items():
    observers.log.event("masters", step=step, weights=number, came=came, kept=kept)
    observers.display.say(
      f"{number:,} weights of step {step} are {came}; they go on in {kept} (optim.master_dtype)"
    )


def redrawn(saved: Experiment, now: Experiment, update: int) -> tuple[float, float, str] | None:
  """Returns the rate that was due at an update, the one it has now, and both in words.

  None where they are the same. Only the length of the run and `earlier_ends` may have changed.
  """
  due, new = (float(make_schedule(of.optim, of.train.num_steps)(update)) for of in (saved, now))
  if math.isclose(due, new, rel_tol=1e-4):
    return None
  text = f"the learning rate goes from {due:.3g} to {new:.3g} here: its decay is drawn anew over "
  text += f"{now.train.num_steps:,} steps"
  ends = saved.optim.schedule.kept_ends(saved.train.num_steps)
  if ends and ends[-1] < now.train.num_steps:
    shown = ",".join(map(str, ends))
    text += f"; with --config.optim.schedule.earlier_ends={shown} it goes on from {due:.3g}"
  return due, new, text


def check_same_run(store: Store, experiment: Experiment, corpus: Corpus) -> None:
  """Raises InputError, with the differences, if the newest readable checkpoint is another run's."""
  for step in reversed(store.steps()):
    try:
      record = read_record(store, step)
      saved = from_plain(Experiment, record["config"])
    except (CheckpointError, InputError, KeyError):
      continue  # what is wrong with it is said when its arrays are read
    changes = unsafe_changes(saved, experiment)
    if ONLY not in record:  # else it has seen no text yet
      changes |= diff(record["corpus"], corpus.identity)
    if changes:
      raise InputError(
        f"{store}: step {step} is of a run of another config or other data "
        f"({changes_line(changes)}); use another workdir, or the same config and files"
      )
    return
