"""Rollback to a checkpoint after steps that would do harm, and on with other data."""

from __future__ import annotations

import pathlib

from jaxmoe.checkpoint import Store
from jaxmoe.core import multihost
from jaxmoe.core.errors import CheckpointError, NotFiniteError
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.observers import Observers
from jaxmoe.train.run_log import read_lines
from jaxmoe.train.saved_steps import was_made
from jaxmoe.train.step_health import HarmfulStepsError
from jaxmoe.train.train_state import State, StateSpec, read_state


class Rollback:
  """Finds the checkpoint that a run goes back to, by the rules of `Recovery`.

  Steps newer than the one gone back to are set aside, and the data goes on where it was. Where all
  that led to a rollback comes from recipe and data, a run that is killed on the way meets it again
  and ends up the same.
  """

  def __init__(
    self, experiment: Experiment, spec: StateSpec, store: Store, observers: Observers,
    events: pathlib.Path,
  ):  # fmt: skip
    self._experiment, self._spec, self._store = experiment, spec, store
    self._observers, self._events = observers, events
    self._last: int | None = None

  def check_budget(self, harm: HarmfulStepsError, rollbacks: int) -> None:
    """Raises NotFiniteError if the run has gone back as often as it may."""
    allowed = self._experiment.train.recovery.max_rollbacks
    if rollbacks >= allowed:
      raise NotFiniteError(
        f"step {harm.step}: {harm.in_a_row} steps in a row were skipped ({harm.why}), and "
        f"{allowed} rollbacks are allowed; lower the learning rate or look at events.jsonl"
      )

  def read(self, harm: HarmfulStepsError) -> tuple[int, State]:
    """Returns the step to go on from, and its state; what is newer is set aside.

    Raises:
      CheckpointError: no checkpoint is intact, or the files cannot be changed.
    """
    target, why = self._target(harm.first), f"went back from step {harm.step}"
    spec, store = self._spec, self._store
    newer = [step for step in store.steps() if step > target]
    from_start = len(newer) == len(store.steps())
    if from_start:
      self._check_start()
    for step in newer:
      # Not as damaged: a run killed before it saves again must be able to start anew.
      store.set_aside(step, why, "undone")
    self._last = target
    if from_start:
      return 0, spec.init(self._experiment.train.seed)
    found = read_state(store, spec, self._observers.damaged)
    assert found is not None
    self._last, arrays, _ = found
    return self._last, spec.from_arrays(arrays)

  def _check_start(self) -> None:
    """Raises CheckpointError where a run does not start from its seed: it cannot go back there."""
    with multihost.raise_on_all():
      if multihost.is_main_process() and was_made(read_lines(self._events)):
        raise CheckpointError(
          f"{self._store}: the run has to go back to step 0, with which it was made; it "
          "is not kept any more; make it anew, with a lower learning rate or a larger train.keep"
        )

  def _target(self, first_bad: int) -> int:
    """Returns the step to go back to; 0 is before the first."""
    stuck = self._last is not None and first_bad == self._last + 1
    limit = (self._last or 0) - 1 if stuck else first_bad - 1
    there = [step for step in self._store.steps() if step <= limit]
    old = [
      step for step in there if step <= first_bad - self._experiment.train.recovery.rollback_steps
    ]
    return old[-1] if old else there[0] if there else 0
