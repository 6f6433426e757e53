"""Restoring a run: afresh, or from the newest checkpoint that is intact and its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxmoe.checkpoint import Store
from jaxmoe.checkpoint.store import read_record
from jaxmoe.core.config_io import diff, from_plain
from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.data.corpus import Corpus
from jaxmoe.optim import make_schedule
from jaxmoe.train.changed_definitions import mended
from jaxmoe.train.experiment import Experiment, unsafe_changes
from jaxmoe.train.parts import Parts
from jaxmoe.train.saver import Saver
from jaxmoe.train.train_state import ONLY, Arrays, State, read_state
from jaxmoe.train.workdir import changes_line


def restore_or_init(
  parts: Parts, saver: Saver, about: dict[str, Any], at_zero: Callable[[State], None]
) -> tuple[int, State]:
  """Returns the step a run goes on from, 0 for a new one, and its state.

  A run whose only checkpoint is of step 0 is new too: its state was made of another run's.

  Args:
    parts: The run.
    saver: Is told how often the run went back so far.
    about: What the first event of a new run says.
    at_zero: Called with the first state of a new run.

  Raises:
    InputError: the checkpoints are of another model or other data than `check_same_run` could tell.
    CheckpointError: there were checkpoints, and none is intact.
  """
  observers = parts.observers
  with observers.phase("start", "looking for a checkpoint"):
    found = read_state(parts.store, parts.spec, observers.damaged)
  if found is None:
    seed = parts.experiment.train.seed
    return 0, _afresh(parts, about, at_zero, lambda: parts.spec.init(seed))
  step, arrays, record = found
  if ONLY not in record:
    parts.stream.restore(record["data"])
  if step == 0:  # made of another run
    state = _afresh(parts, about, at_zero, lambda: parts.spec.from_arrays(arrays))
    _tell_recast(parts, 0, arrays)
    return 0, state
  saver.rollbacks = record["rollbacks"]
  cut = parts.forget(step)
  seconds = observers.clock.take("start")
  lost = {"lost_s": cut.seconds, "lost_until_unix_s": cut.last_unix_s}
  clock = {"seconds": seconds, **lost} if cut.steps else {"seconds": seconds}
  observers.log.event("resume", time=clock, step=step, lost_steps=cut.steps)
  observers.display.say(f"going on from step {step}")
  _tell_recast(parts, step, arrays)
  state = parts.spec.from_arrays(arrays)
  if step < parts.experiment.train.num_steps:
    update = int(state.step - state.skipped - state.unlabelled)
    rates = redrawn(from_plain(Experiment, record["config"]), parts.experiment, update)
    if rates is not None:
      observers.log.event("learning_rate", step=step, due=rates[0], now=rates[1])
      observers.display.say(rates[2])
    for name, what in mended(record, parts.spec.decoder).items():
      observers.log.event("mended", step=step, definition=name, what=what)
      observers.display.say(f"from step {step} on, {what}")
  return step, state


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


def _tell_recast(parts: Parts, step: int, arrays: Arrays) -> None:
  """Tells of parameters that a checkpoint has in another dtype than they go on in."""
  for (came, kept), number in parts.spec.recast(arrays).items():
    parts.observers.log.event("masters", step=step, weights=number, came=came, kept=kept)
    parts.observers.display.say(
      f"{number:,} weights of step {step} are {came}; they go on in {kept} (optim.master_dtype)"
    )


def _afresh(
  parts: Parts,
  about: dict[str, Any],
  at_zero: Callable[[State], None],
  make: Callable[[], State],
) -> State:
  observers = parts.observers
  parts.forget(-1)  # what the untrained model wrote comes again, too
  with observers.phase("start", "making parameters"):
    state = jax.block_until_ready(make())
  at_zero(state)
  observers.log.event("start", time={"seconds": observers.clock.take("start")}, **about)
  return state


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
