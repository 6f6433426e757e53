"""Restoring a run from its newest checkpoint, or the init of a new one; what changed since."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxmoe.checkpoint import Store
from jaxmoe.checkpoint.store import read_record
from jaxmoe.core import multihost
from jaxmoe.core.config_io import diff, from_plain
from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.data.corpus import Corpus
from jaxmoe.data.stream import BatchStream
from jaxmoe.models.transformer import Decoder
from jaxmoe.optim import make_schedule
from jaxmoe.train.changed_definitions import mended
from jaxmoe.train.experiment import Experiment, unsafe_changes
from jaxmoe.train.held_table import changed_table
from jaxmoe.train.hooks import SamplesHook
from jaxmoe.train.observers import Observers
from jaxmoe.train.run_log import CutLines, RunLog
from jaxmoe.train.train_state import ONLY, Arrays, State, StateSpec, read_state
from jaxmoe.train.workdir import changes_line


@dataclasses.dataclass(frozen=True)
class Start:
  """Where a process begins: a step, the state after it, and how often the run had gone back."""

  step: int
  state: State
  rollbacks: int = 0


def restore_or_init(
  experiment: Experiment, spec: StateSpec, store: Store, stream: BatchStream,
  observers: Observers, sampling: SamplesHook, about: Callable[[], dict[str, Any]],
) -> Start:  # fmt: skip
  """Returns the start from the newest intact checkpoint, or that of a new run.

  A run whose only checkpoint is of step 0 is new too: its state was made of another run's.

  Args:
    experiment: The recipe.
    spec: Of its state.
    store: Where checkpoints are.
    stream: The batches; they go on after those of the checkpoint.
    observers: Who is told.
    sampling: What writes texts; those of later steps are cut off.
    about: Returns what the first event of a new run says.

  Raises:
    InputError: the checkpoints are of another model or other data than `check_same_run` could
      tell.
    CheckpointError: there were checkpoints, and none is intact.
  """
  with observers.phase("start", "looking for a checkpoint"):
    found = read_state(store, spec, observers.damaged)
  if found is None:
    return _init(experiment.train.seed, spec, None, observers, sampling, about)
  step, arrays, record = found
  if ONLY not in record:
    stream.restore(record["data"])
  if step == 0:  # made of another run
    start = _init(experiment.train.seed, spec, arrays, observers, sampling, about)
    tell_recast(observers, 0, spec.recast(arrays))
    return start
  cut = forget(observers.log, sampling, step)
  seconds = observers.clock.take("start")
  lost = {"lost_s": cut.seconds, "lost_until_unix_s": cut.last_unix_s}
  clock = {"seconds": seconds, **lost} if cut.steps else {"seconds": seconds}
  observers.log.event("resume", time=clock, step=step, lost_steps=cut.steps)
  observers.display.say(f"going on from step {step}")
  tell_recast(observers, step, spec.recast(arrays))
  state = spec.from_arrays(arrays)
  if step < experiment.train.num_steps:
    tell_changes(observers, step, state, record, experiment, spec.decoder)
  return Start(step, state, record["rollbacks"])


def _init(
  seed: int, spec: StateSpec, arrays: Arrays | None, observers: Observers, sampling: SamplesHook,
  about: Callable[[], dict[str, Any]],
) -> Start:  # fmt: skip
  """Begins a new run, of its seed or of arrays; what the untrained model writes can wait."""
  forget(observers.log, sampling, -1)  # what the untrained model wrote comes again, too
  with observers.phase("start", "making parameters"):
    state = spec.init(seed) if arrays is None else spec.from_arrays(arrays)
    jax.block_until_ready(state)
  sampling.wait(0, state)
  fields = about()
  observers.log.event("start", time={"seconds": observers.clock.take("start")}, **fields)
  return Start(0, state)


def forget(log: RunLog, sampling: SamplesHook, step: int) -> CutLines:
  """Cuts off what was written of steps after `step`, and returns the lines that went.

  Raises:
    CheckpointError: the disk refuses to change the files.
  """
  with multihost.raise_on_all():
    if not multihost.is_main_process():
      return CutLines()
    try:
      cut = log.resume(step)
      sampling.forget(step)
    except OSError as error:
      raise CheckpointError(f"cannot cut the files of the run to step {step}: {error}") from error
    return cut


def tell_changes(
  observers: Observers, step: int, state: State, record: Mapping[str, Any],
  experiment: Experiment, decoder: Decoder,
) -> None:  # fmt: skip
  """Tells of what goes on otherwise than the checkpoint with `record` would have."""
  update = int(state.step - state.skipped - state.unlabelled)
  saved = from_plain(Experiment, record["config"])
  rates = redrawn(saved, experiment, update)
  if rates is not None:
    observers.log.event("learning_rate", step=step, due=rates[0], now=rates[1])
    observers.display.say(rates[2])
  if what := changed_table(saved, experiment):
    observers.log.event("pipeline_table", step=step)
    observers.display.say(f"from step {step} on, {what}")
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
