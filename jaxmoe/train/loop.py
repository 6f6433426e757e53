"""The training loop: dispatch step n, then fetch and write the metrics of step n - 1.

Hooks run after a step whose number they are due at; what they return is written into the step's
line. A checkpoint is written after the line of its step is on the disk, so that a run that goes on
from it finds every line before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from jaxmoe.core.errors import NotFiniteError
from jaxmoe.core.names import Splits
from jaxmoe.train.experiment import Train
from jaxmoe.train.journal import Journal
from jaxmoe.train.progress import Display
from jaxmoe.train.state import State
from jaxmoe.train.step import Step
from jaxmoe.train.summary import summarize


class Hook(Protocol):
  """Something that is done every so many steps."""

  name: str
  every: int

  def __call__(self, step: int, state: State) -> dict[str, Any]:
    """Returns what is written into the line of the step. Must not change the state."""


@dataclasses.dataclass(frozen=True)
class Rates:
  """What speeds are computed from: model FLOPs of a step and the measured peak per second."""

  flops_per_step: float
  peak_flops_per_s: float


@dataclasses.dataclass(frozen=True)
class Job:
  """Everything the loop needs.

  Attributes:
    train: How long, and how often.
    splits: How layers are grouped in memory.
    step: The compiled step.
    next_batch: Returns the next batch, on the devices.
    data_time: Returns what data cost since the start: `busy_s`, processor seconds of the thread
      that works ahead, and `mb_per_s` of them.
    hooks: What is done on the way.
    save: Writes a checkpoint of (step, state).
    stopped: Whether the run was asked to stop.
    journal: Where lines go.
    display: What a person sees.
    rates: What speeds are computed from.
  """

  train: Train
  splits: Splits
  step: Step
  next_batch: Callable[[], dict[str, jax.Array]]
  data_time: Callable[[], dict[str, float]]
  hooks: tuple[Hook, ...]
  save: Callable[[int, State], None]
  stopped: Callable[[], bool]
  journal: Journal
  display: Display
  rates: Rates


class Clock:
  """Seconds by phase since the last line.

  `step` is a step's own time, waiting for data included; a checkpoint's stall counts in the line
  after it, since the line of its step is on the disk first.
  """

  def __init__(self) -> None:
    self._busy_s = 0.0
    self._start(time.perf_counter())

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts the time inside towards `name`."""
    start = time.perf_counter()
    yield
    self._phases[name] += time.perf_counter() - start

  def step_is_done(self) -> None:
    """Ends the step's own time; without this call it ends with the line."""
    self._done = time.perf_counter()

  def line(self, tokens: float, rates: Rates, data: dict[str, float]) -> dict[str, Any]:
    """Returns the `time` entry of a line and starts the next.

    Args:
      tokens: Tokens of the step.
      rates: What `mfu` is computed from.
      data: See `Job.data_time`; `data_share` is its busy seconds over those of the step.
    """
    now = time.perf_counter()
    step_s = max((self._done or now) - self._since - self._phases["checkpoint"], 1e-9)
    seconds = {"total": now - self._since, "step": step_s, **self._phases}
    busy_s, self._busy_s = data["busy_s"] - self._busy_s, data["busy_s"]
    self._start(now)
    return {
      "tokens_per_s": round(tokens / step_s, 1),
      "mfu": round(rates.flops_per_step / step_s / rates.peak_flops_per_s, 4),
      "data_share": round(busy_s / step_s, 4),
      "data_mb_per_s": round(data["mb_per_s"], 3),
      "seconds": {name: round(value, 6) for name, value in seconds.items()},
    }

  def _start(self, now: float) -> None:
    self._since, self._done = now, 0.0
    self._phases = {"data": 0.0, "hooks": 0.0, "checkpoint": 0.0}


def run(job: Job, state: State, first: int) -> tuple[int, State]:
  """Trains from step `first` until the end, or until asked to stop; returns where it stands.

  The state is saved at the last step it returns.

  Raises:
    NotFiniteError: more steps were skipped than the budget allows.
  """
  clock, n, pending = Clock(), first, None
  job.display.start(first)
  while n < job.train.num_steps:
    with clock.phase("data"):
      batch = job.next_batch()
    state, metrics = job.step(state, batch)
    n += 1
    if pending is not None:
      _write(job, clock, pending[0], pending[1], {})
    pending = (n, metrics)
    ending = n == job.train.num_steps or job.stopped()
    due = [hook for hook in job.hooks if hook.every and n % hook.every == 0]
    saving = ending or n % job.train.checkpoint_every == 0
    if due or saving:
      jax.block_until_ready(metrics)  # or the step's own seconds would count as the hooks'
      clock.step_is_done()
      extra: dict[str, Any] = {}
      with clock.phase("hooks"):
        for hook in due:
          extra.update(hook(n, state))
      _write(job, clock, n, metrics, extra)
      pending = None
    if saving:
      job.journal.sync()
      with clock.phase("checkpoint"):
        job.save(n, state)
    if ending:
      break
  return n, state


def _write(job: Job, clock: Clock, step: int, metrics: Any, extra: dict[str, Any]) -> None:
  line = {"step": step, **summarize(metrics, job.splits), **extra}
  line["time"] = clock.line(line["tokens"], job.rates, job.data_time())
  job.journal.step(line)
  job.display.step(line)
  if not metrics["finite"]:
    job.journal.event("skipped", step=step, loss=line["loss"], grad_norm=line["grad_norm"])
    job.display.say(f"step {step} skipped: loss or gradient is not finite")
  if line["skipped"] > job.train.max_skips:
    raise NotFiniteError(
      f"step {step}: {line['skipped']} steps were not finite, {job.train.max_skips} are allowed; "
      "lower the learning rate or look at events.jsonl"
    )
