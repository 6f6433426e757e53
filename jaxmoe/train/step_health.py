"""The health of a run, by the lines of its steps: those that were skipped, and what was dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoe.core.errors import DropError, NotFiniteError
from jaxmoe.train.experiment import Train
from jaxmoe.train.observers import Observers
from jaxmoe.train.step_line import DispatchedStep


class HarmfulStepsError(Exception):
  """Too many steps in a row were skipped, but for those without labels between them.

  Caught by the trainer itself, which goes back.

  Attributes:
    step: The last of them.
    batch: The number of its batch.
    in_a_row: How many there were.
    why: What was wrong with the last.
    first: The first of them.
  """

  def __init__(self, step: int, batch: int, in_a_row: int, why: str, first: int):
    super().__init__(step, batch, in_a_row, why, first)
    self.step, self.batch, self.in_a_row, self.why, self.first = step, batch, in_a_row, why, first


class StepHealth:
  """Tells of steps that were skipped, and ends what has too many of them.

  Args:
    train: The budget.
    observers: Who is told.
  """

  def __init__(self, train: Train, observers: Observers):
    self._train, self._observers = train, observers
    self._between = 0

  def forget(self) -> None:
    """Starts anew, after a rollback."""
    self._between = 0

  def check(self, dispatched: DispatchedStep, line: Mapping[str, Any]) -> int:
    """Returns how many steps in a row were skipped up to this one.

    Raises:
      HarmfulStepsError: they are too many in a row.
      NotFiniteError: they are too many in all.
    """
    in_a_row = int(dispatched.metrics["in_a_row"])
    if not in_a_row:
      self._between = 0
    elif line.get("labels") == 0:
      self._between += 1
    else:
      self._skipped(dispatched, line, in_a_row)
    return in_a_row

  def _skipped(self, dispatched: DispatchedStep, line: Mapping[str, Any], in_a_row: int) -> None:
    step, train = dispatched.step, self._train
    why = "spike" if dispatched.metrics["finite"] else "not finite"
    event_fields = {"loss": line["loss"], "grad_norm": line["grad_norm"]}
    self._observers.log.event("skipped", step=step, why=why, **event_fields)
    shown = "far above the last ones" if why == "spike" else why
    self._observers.display.say(f"step {step} skipped: loss or gradient is {shown}")
    if line["skipped"] > train.max_skips:
      raise NotFiniteError(
        f"step {step}: {line['skipped']} steps were skipped, {train.max_skips} are allowed; "
        "lower the learning rate or look at events.jsonl"
      )
    if in_a_row >= train.recovery.patience:
      first = step - in_a_row - self._between + 1
      raise HarmfulStepsError(step, dispatched.data["batches"], in_a_row, why, first)


def check_drops(line: Mapping[str, Any], limits: Mapping[int, float]) -> None:
  """Ends the run where a layer has dropped more than it may.

  Args:
    line: Of the step.
    limits: By depth, the share of a layer's choices above which drops end the run.

  Raises:
    DropError: a layer did.
  """
  for depth, limit in limits.items():
    rate = line["layers"][str(depth)]["drop_rate"]
    if rate is not None and rate > limit:
      raise DropError(
        f"step {line['step']}: layer {depth} dropped {rate:.2%} of its choices, at most "
        f"{limit:.2%} are allowed; start anew with more room for experts (factor, bound) or with a "
        "larger max_drop_rate"
      )
