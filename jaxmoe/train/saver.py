"""Saving the state of a run on the way, and what happens when it fails.

What is saved is one unit: parameters, optimizer, counters, the data's state, seed and config.
"""

from __future__ import annotations

from jaxmoe.checkpoint import Store
from jaxmoe.core.errors import CheckpointError
from jaxmoe.core.recipe import to_plain
from jaxmoe.data.stream import Stream
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.journal import Journal
from jaxmoe.train.progress import Display
from jaxmoe.train.state import State, StateSpec

MAX_FAILED_SAVES = 3


class Saver:
  """Writes checkpoints; gives up after three failures in a row.

  A write goes on in the background: whether it succeeded is known, and counted, at the next one.
  """

  def __init__(
    self,
    spec: StateSpec,
    experiment: Experiment,
    ends: tuple[Store, Stream],
    journal: Journal,
    display: Display,
  ):
    self._spec, self._experiment = spec, experiment
    self._store, self._stream = ends
    self._journal, self._display = journal, display
    self._failures = 0
    self._writing: int | None = None

  def __call__(self, step: int, state: State) -> None:
    """Starts to write a step; the state may be donated afterwards."""
    self._settle()
    record = {
      "step": step,
      "seed": self._experiment.train.seed,
      "config": to_plain(self._experiment),
      "data": self._stream.state(),
    }
    try:
      self._store.write(step, self._spec.to_arrays(state), record)
    except CheckpointError as error:
      self._failed(step, error)
    else:
      self._writing = step
      self._journal.event("checkpoint", step=step)

  def finish(self, step: int, state: State) -> None:
    """Returns once `step` is wholly written; tries again while failures are few enough."""
    self._settle()
    while step not in self._store.steps():
      self(step, state)
      self._settle()

  def _settle(self) -> None:
    """Waits for the write that is under way, if any, and counts how it ended."""
    step, self._writing = self._writing, None
    if step is None:
      return
    try:
      self._store.wait()
    except CheckpointError as error:
      self._failed(step, error)
    else:
      self._failures = 0

  def _failed(self, step: int, error: CheckpointError) -> None:
    self._failures += 1
    self._journal.event("save_failed", step=step, why=str(error))
    self._display.say(f"saving failed ({self._failures} of {MAX_FAILED_SAVES}): {error}")
    if self._failures >= MAX_FAILED_SAVES:
      raise error
