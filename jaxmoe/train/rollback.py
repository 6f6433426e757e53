"""Rollback to a checkpoint after steps that would do harm, and on with other data."""

from __future__ import annotations

import pathlib

from jaxmoe.core import multihost
from jaxmoe.core.errors import CheckpointError, NotFiniteError
from jaxmoe.train.loop import Harm
from jaxmoe.train.parts import Parts
from jaxmoe.train.run_log import read_lines
from jaxmoe.train.saved_steps import was_made
from jaxmoe.train.saver import Saver
from jaxmoe.train.train_state import State, read_state


class Rollback:
  """Takes a run back, by the rules of `Recovery`.

  Steps newer than the one gone back to are set aside, and the data goes on where it was. Where all
  that led to a rollback comes from recipe and data, a run that is killed on the way meets it again
  and ends up the same.
  """

  def __init__(self, parts: Parts, saver: Saver, events: pathlib.Path):
    self._events = events
    self._parts, self._saver = parts, saver
    self._recovery = parts.experiment.train.recovery
    self._last: int | None = None

  def __call__(self, harm: Harm) -> tuple[int, State]:
    """Returns the step to go on from, and its state.

    Raises:
      NotFiniteError: the run has gone back as often as it may.
      CheckpointError: no checkpoint is intact, or the files cannot be changed.
    """
    allowed = self._recovery.max_rollbacks
    if self._saver.rollbacks >= allowed:
      raise NotFiniteError(
        f"step {harm.step}: {harm.in_a_row} steps in a row were skipped ({harm.why}), and "
        f"{allowed} rollbacks are allowed; lower the learning rate or look at events.jsonl"
      )
    observers, skip = self._parts.observers, self._recovery.skip_batches
    with observers.phase("checkpoint", f"going back from step {harm.step}"):
      self._saver.settle()
      step, state = self._read(harm)
      self._saver.rollbacks += 1
      while self._parts.stream.num_batches < harm.batch + skip:
        next(self._parts.stream)
      cut = self._parts.forget(step)
    lost_s = cut.seconds + sum(observers.clock.take("step").values())
    event_fields = {"step": harm.step, "to": step, "skipped_batches": skip, "why": harm.why}
    observers.log.event("rollback", time={"lost_s": round(lost_s, 3)}, **event_fields)
    observers.display.say(f"went back to step {step}; {skip} more batches are left out")
    return step, state

  def _read(self, harm: Harm) -> tuple[int, State]:
    target, why = self._target(harm.first), f"went back from step {harm.step}"
    spec, store = self._parts.spec, self._parts.store
    newer = [step for step in store.steps() if step > target]
    from_start = len(newer) == len(store.steps())
    if from_start:
      self._check_start()
    for step in newer:
      # Not as damaged: a run killed before it saves again must be able to start anew.
      store.set_aside(step, why, "undone")
    self._last = target
    if from_start:
      return 0, spec.init(self._parts.experiment.train.seed)
    found = read_state(store, spec, self._parts.observers.damaged)
    assert found is not None
    self._last, arrays, _ = found
    return self._last, spec.from_arrays(arrays)

  def _check_start(self) -> None:
    """Raises CheckpointError where a run does not start from its seed: it cannot go back there."""
    with multihost.raise_on_all():
      if multihost.is_main_process() and was_made(read_lines(self._events)):
        raise CheckpointError(
          f"{self._parts.store}: the run has to go back to step 0, with which it was made; it "
          "is not kept any more; make it anew, with a lower learning rate or a larger train.keep"
        )

  def _target(self, first_bad: int) -> int:
    """Returns the step to go back to; 0 is before the first."""
    stuck = self._last is not None and first_bad == self._last + 1
    limit = (self._last or 0) - 1 if stuck else first_bad - 1
    there = [step for step in self._parts.store.steps() if step <= limit]
    old = [step for step in there if step <= first_bad - self._recovery.rollback_steps]
    return old[-1] if old else there[0] if there else 0
