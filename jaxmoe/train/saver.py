"""Saving checkpoints of a run on the way, and what happens when it fails.

What is saved is one unit: parameters, optimizer, counters, the data's state, seed and config. A
checkpoint is written after the lines before it are on the disk, so that a run that goes on from it
finds every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxmoe.checkpoint import Store
from jaxmoe.core import multihost
from jaxmoe.core.config_io import to_plain
from jaxmoe.core.errors import CheckpointError
from jaxmoe.data.corpus import Corpus
from jaxmoe.data.stream import BatchStream
from jaxmoe.train import changed_definitions
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.observers import Observers
from jaxmoe.train.train_state import State, StateSpec

MAX_FAILED_SAVES = 3


def make_record(
  step: int, experiment: Experiment, corpus: Corpus, stream: BatchStream, rollbacks: int
) -> dict[str, Any]:
  """Returns what lies beside the arrays of a step."""
  return {
    "step": step,
    "seed": experiment.train.seed,
    "config": to_plain(experiment),
    "corpus": corpus.identity,
    "data": stream.state(),
    "rollbacks": rollbacks,
    changed_definitions.KEY: list(changed_definitions.MENDED),
  }


class Saver:
  """Writes checkpoints; gives up after three failures in a row.

  A write goes on in the background: whether it succeeded is known, and counted, at the next one.

  Attributes:
    rollbacks: How often the run has gone back; a part of what is saved.
  """

  def __init__(
    self, experiment: Experiment, corpus: Corpus, spec: StateSpec, store: Store,
    stream: BatchStream, observers: Observers,
  ):  # fmt: skip
    self._experiment, self._corpus, self._stream = experiment, corpus, stream
    self._spec, self._store = spec, store
    self._log, self._display = observers.log, observers.display
    self._failures = 0
    self._writing: int | None = None
    self.rollbacks = 0

  def __call__(self, step: int, state: State) -> None:
    """Starts to write a step; the state may be donated afterwards."""
    self.settle()
    why = _trouble(self._log.sync) or _trouble(lambda: self._write(step, state))
    if why:
      self._failed(step, why)
    else:
      self._writing = step
      self._log.event("checkpoint", step=step)

  def finish(self, step: int, state: State) -> None:
    """Returns once `step` is wholly written; tries again while failures are few enough."""
    self.settle()
    while step not in self._store.steps():
      self(step, state)
      self.settle()

  def settle(self) -> None:
    """Waits for the write that is under way, if any, and counts how it ended."""
    step, self._writing = self._writing, None
    if step is None:
      return
    why = _trouble(self._store.wait)
    if why:
      self._failed(step, why)
    else:
      self._failures = 0
    for old, reason in self._store.unremoved().items():
      self._log.event("not_removed", step=old, why=reason)
      self._display.say(f"checkpoint {old} is not needed any more and cannot be removed: {reason}")

  def _write(self, step: int, state: State) -> None:
    record = make_record(step, self._experiment, self._corpus, self._stream, self.rollbacks)
    self._store.write(step, self._spec.to_arrays(state), record)

  def _failed(self, step: int, why: str) -> None:
    self._failures += 1
    self._log.event("save_failed", step=step, why=why)
    self._display.say(f"saving failed ({self._failures} of {MAX_FAILED_SAVES}): {why}")
    if self._failures >= MAX_FAILED_SAVES:
      raise CheckpointError(why)


def _trouble(action: Callable[[], None]) -> str:
  """Does it and returns '', or why it failed, were it on another process only."""
  why = ""
  try:
    action()
  except (CheckpointError, OSError) as error:
    why = str(error)
  return multihost.first_error(why)
