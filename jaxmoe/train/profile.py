"""A profiler trace of some steps, for `xprof`, TensorBoard's profile plugin or Perfetto.

Phases carry `jax.named_scope` names, so the trace reads like the code: embed, attention,
moe/{route,plan,move,experts,combine,shared,sums}, mlp, final_norm, loss, balance, count_choices,
optimizer; the backward pass has the same names inside `transpose(...)`. A program that comes out of
the compile cache carries the names of the code that compiled it: a process that profiles sets
`jax_compilation_cache_include_metadata_in_key`.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax

from jaxmoe.core.errors import InputError

MAX_STEPS = 100
"""A trace of more steps is too large for the tools that show it."""


def parse_steps(text: str, num_steps: int) -> tuple[int, int]:
  """Returns the first and the last step of 'a:b'; both are profiled.

  Raises:
    InputError: not of that form, or steps that a run of `num_steps` never comes to, or too many.
  """
  found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
  where = f"--profile_steps={text}"
  if not found:
    raise InputError(f"{where}: expected FIRST:LAST, such as --profile_steps=10:12")
  first, last = int(found[1]), int(found[2])
  if not 1 <= first <= last <= num_steps:
    raise InputError(f"{where}: needs 1 <= FIRST <= LAST <= {num_steps}, the steps of the run")
  if last - first >= MAX_STEPS:
    raise InputError(
      f"{where}: {last - first + 1} steps make a trace that no tool opens; give at most {MAX_STEPS}"
    )
  return first, last


class Profiler:
  """Traces steps `first` to `last` into a folder; the loop calls it around every step.

  The step before is waited for, so that the trace holds nothing of it, and the last one, so that
  the trace holds all of it. A run that goes on within the range profiles the rest of it; one that
  ends early keeps what there is. What the profiler itself fails at is told and stops no run.
  """

  def __init__(
    self, first: int, last: int, folder: pathlib.Path, say: Callable[[str], None] = print
  ):
    self.first, self.last, self.folder = first, last, folder
    self.say = say
    self._started: int | None = None
    self._over = False
    self._mark: Any = None

  def before(self, step: int) -> None:
    """Is called before `step` is dispatched; the program must be compiled."""
    if self._over:
      return
    if step > self.last:
      self._over = True
      self.say(f"nothing to profile: the run goes on at step {step}, after step {self.last}")
    elif step >= self.first:
      self._guarded(lambda: self._enter(step))

  def after(self, step: int, metrics: Any) -> None:
    """Is called once `step` is dispatched, with what it will return.

    Waits for it if it is the last one that is profiled, or the last one that is not.
    """
    if self._over or step < self.first - 1:
      return
    if step == self.first - 1:
      jax.block_until_ready(metrics)
    elif step < self.last:
      self._leave()
    else:
      jax.block_until_ready(metrics)
      self._stop(step)

  def close(self) -> None:
    """Is called when the run ends, however it does; writes what was traced until then."""
    if self._started is not None and not self._over:
      self._stop(None)
    self._over = True

  def _enter(self, step: int) -> None:
    if self._started is None:
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # it slows what is measured and hides it in the picture
      jax.profiler.start_trace(str(self.folder), profiler_options=options)
      self._started = step
    self._mark = jax.profiler.StepTraceAnnotation("train_step", step_num=step)
    self._mark.__enter__()

  def _leave(self) -> None:
    if self._mark is not None:
      self._mark.__exit__(None, None, None)
    self._mark = None

  def _stop(self, step: int | None) -> None:
    self._over = True
    self._leave()
    if self._started is None:
      return
    self._guarded(jax.profiler.stop_trace)
    steps = f"{self._started} to {step}" if step else f"{self._started} to the run's end"
    self.say(f"profile of steps {steps} in {self.folder}")

  def _guarded(self, action: Callable[[], None]) -> None:
    """Does it; what it raises is told, and the profile given up."""
    try:
      action()
    except Exception as error:
      self._over = True
      self.say(f"no profile: {type(error).__name__}: {error}")
