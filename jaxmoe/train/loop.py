"""The training loop: dispatch step n, then fetch and write the metrics of step n - 1.

A line's seconds are those between the moment at which the step before was done and that at which
its own was, whenever the two were dispatched and fetched; with what hooks took behind them.

Hooks run after a step whose number they are due at, and after the last; what they return is written
into the step's line. A checkpoint is written after the line of its step, and not after a step that
was skipped: whatever made it harmful may be in the state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from jaxmoe.core.errors import DropError, NotFiniteError
from jaxmoe.core.param_names import LayerGroupSizes
from jaxmoe.train.completion import Completion, CompletionWatcher
from jaxmoe.train.experiment import Train
from jaxmoe.train.observers import Observers
from jaxmoe.train.step import Step
from jaxmoe.train.step_summary import summarize
from jaxmoe.train.train_state import State


class Hook(Protocol):
  """Something that is done every so many steps; `name` is the category its time is booked in."""

  name: str
  every: int

  def __call__(self, step: int, state: State) -> dict[str, Any]:
    """Returns what is written into the line of the step. Must not change the state."""


class Sink(Protocol):
  """Something that also takes the lines; it neither raises nor waits."""

  def __call__(self, line: dict[str, Any]) -> None:
    """Takes the line of a step."""

  def rollback(self, step: int) -> None:
    """Forgets the lines after `step`, which will come again."""


class Profiler(Protocol):
  """Something that looks at single steps while they run."""

  def before(self, step: int) -> None:
    """Is told that a step will be dispatched."""

  def after(self, step: int, metrics: Any) -> None:
    """Is told that a step has been dispatched."""


@dataclasses.dataclass(frozen=True)
class Rates:
  """What speeds are computed from: model FLOPs of a step and the measured peak per second."""

  flops_per_step: float
  peak_flops_per_s: float


@dataclasses.dataclass(frozen=True)
class Drawn:
  """A batch on the devices.

  Attributes:
    batch: The arrays.
    number: How many batches were handed out with it.
    counters: What was handed out so far, by domain.
    busy_s: Processor seconds of the thread that works ahead, since the start.
    mb_per_s: Megabytes per busy second.
  """

  batch: dict[str, jax.Array]
  number: int
  counters: dict[str, Any]
  busy_s: float
  mb_per_s: float


@dataclasses.dataclass(frozen=True)
class Harm:
  """Steps in a row that were skipped, but for those without labels between them.

  Attributes:
    step: The last of them.
    batch: The number of its batch.
    in_a_row: How many there were.
    why: What was wrong with the last.
    first: The first of them.
  """

  step: int
  batch: int
  in_a_row: int
  why: str
  first: int


class HarmError(Exception):
  """Too many steps in a row were skipped; caught by the loop itself."""

  def __init__(self, harm: Harm):
    super().__init__(harm)
    self.harm = harm


@dataclasses.dataclass(frozen=True)
class Job:
  """Everything the loop needs.

  Attributes:
    train: How long, and how often.
    layer_groups: How layers are grouped in memory.
    step: The compiled step.
    draw: Returns the next batch.
    hooks: What is done on the way.
    save: Writes a checkpoint of (step, state).
    roll_back: Returns (step, state) to go on from after a `Harm`; raises NotFiniteError when that
      is not allowed any more.
    stopped: Whether the run was asked to stop.
    observers: Who looks on.
    rates: What speeds are computed from.
    drop_limits: By depth, the share of a layer's choices above which drops end the run.
    sinks: Where lines go besides the log.
    profiler: What looks at single steps.
    standstill: Told of the metrics of each step, where the step counts what stood still.
  """

  train: Train
  layer_groups: LayerGroupSizes
  step: Step
  draw: Callable[[], Drawn]
  hooks: tuple[Hook, ...]
  save: Callable[[int, State], None]
  roll_back: Callable[[Harm], tuple[int, State]]
  stopped: Callable[[], bool]
  observers: Observers
  rates: Rates
  drop_limits: Mapping[int, float] = dataclasses.field(default_factory=dict)
  sinks: tuple[Sink, ...] = ()
  profiler: Profiler | None = None
  standstill: Callable[[int, Any], None] | None = None


@dataclasses.dataclass
class _Dispatched:
  """A step that was dispatched, and what its line needs."""

  step: int
  metrics: Any
  drawn: Drawn
  since_busy_s: float
  completion: Completion


def run(job: Job, state: State, first: int) -> tuple[int, State]:
  """Trains from step `first` until the end, or until asked to stop; returns where it stands.

  The state is saved at the last step it returns.

  Raises:
    NotFiniteError: more steps were skipped, or more rollbacks needed, than the budget allows.
    DropError: a layer dropped more than its limit.
  """
  with contextlib.closing(CompletionWatcher()) as completions:
    loop = _Loop(job, state, first, completions)
    job.observers.display.start(first)
    while loop.step < job.train.num_steps and not loop.ended:
      try:
        loop.advance()
      except HarmError as error:
        loop.go_on_from(*job.roll_back(error.harm))
        for sink in job.sinks:
          sink.rollback(loop.step)
  return loop.step, loop.state


class _Loop:
  """Where a run stands between two steps."""

  def __init__(self, job: Job, state: State, first: int, completions: CompletionWatcher):
    self._job, self._arrivals = job, completions
    self._busy_s = 0.0
    self._pending: _Dispatched | None = None
    self.go_on_from(first, state)

  def go_on_from(self, step: int, state: State) -> None:
    """Sets step and state; a step that was dispatched is forgotten."""
    self.step, self.state, self.ended = step, state, False
    self._pending, self._between = None, 0

  def advance(self) -> None:
    """Makes a step, and whatever is due after it."""
    job, n = self._job, self.step + 1
    metrics, drawn = self._dispatch(n)
    self.step, before = n, self._pending
    completion = self._arrivals.expect(metrics)
    self._pending = _Dispatched(n, metrics, drawn, self._busy_s, completion)
    self._busy_s = drawn.busy_s
    if before is not None:
      self._write(before)
    last = n == job.train.num_steps
    self.ended = last or job.stopped()
    due = [hook for hook in job.hooks if hook.every and (last or n % hook.every == 0)]
    saving = self.ended or n % job.train.checkpoint_every == 0
    skipped = 0
    if due or saving:
      skipped = self._finish(due)
    if saving and (self.ended or not skipped):
      with job.observers.phase("checkpoint"):
        job.save(n, self.state)

  def _dispatch(self, n: int) -> tuple[Any, Drawn]:
    job = self._job
    before = self._pending.completion if self._pending is not None else None
    if before is not None:
      before.look()
    with job.observers.phase("data"):
      drawn = job.draw()
    job.observers.watchdog.beat(f"step {n}")
    if before is not None:
      before.before_dispatch()
    if job.profiler is not None:
      job.profiler.before(n)
    self.state, metrics = job.step(self.state, drawn.batch)
    if job.profiler is not None:
      job.profiler.after(n, metrics)
    return metrics, drawn

  def _finish(self, due: list[Hook]) -> int:
    """Runs hooks on the state of the step and writes its line; returns the skips in a row."""
    job, dispatched = self._job, self._pending
    assert dispatched is not None
    jax.block_until_ready(dispatched.metrics)  # or the step's own seconds would count as a hook's
    extra: dict[str, Any] = {}
    for hook in due:
      with job.observers.phase(hook.name):
        extra.update(hook(dispatched.step, self.state))
    self._pending = None
    return self._write(dispatched, extra)

  def _write(self, dispatched: _Dispatched, extra: dict[str, Any] | None = None) -> int:
    """Writes the line of a step; returns how many steps in a row were skipped up to it.

    Raises:
      HarmError: they are too many in a row.
      NotFiniteError: they are too many in all.
      DropError: a layer dropped more than its limit.
    """
    line = _write(self._job, dispatched, extra)
    in_a_row = int(dispatched.metrics["in_a_row"])
    if not in_a_row:
      self._between = 0
    elif line.get("labels") == 0:
      self._between += 1
    else:
      _skipped(self._job, dispatched, line, self._between)
    return in_a_row


def _write(job: Job, dispatched: _Dispatched, extra: dict[str, Any] | None) -> dict[str, Any]:
  """Writes and returns the line of a step; DropError if a layer dropped more than its limit.

  Its seconds end when it was done or, with what hooks returned as `extra`, now.
  """
  step, metrics, drawn = dispatched.step, dispatched.metrics, dispatched.drawn
  line = {
    "step": step,
    **summarize(metrics, job.layer_groups),
    "data": drawn.counters,
    **(extra or {}),
  }
  dispatched.completion.look()
  until_s = dispatched.completion.at if extra is None else math.inf
  line["time"] = _clock(job, dispatched, line["tokens"], until_s)
  job.observers.log.step(line)
  job.observers.display.step(line)
  for sink in job.sinks:
    sink(line)
  if line.get("labels") == 0 and line["unlabelled"] == 1:
    job.observers.display.say(
      f"step {step}: no token has a label, and nothing changes; such steps are counted (unlabelled)"
    )
  if job.standstill is not None:
    job.standstill(step, metrics)
  _check_drops(job, line)
  return line


def _skipped(job: Job, dispatched: _Dispatched, line: dict[str, Any], between: int) -> None:
  """Tells of a step that was skipped; raises where there were too many."""
  step, metrics = dispatched.step, dispatched.metrics
  why = "spike" if metrics["finite"] else "not finite"
  event_fields = {"loss": line["loss"], "grad_norm": line["grad_norm"]}
  job.observers.log.event("skipped", step=step, why=why, **event_fields)
  job.observers.display.say(f"step {step} skipped: loss or gradient is {_shown(why)}")
  if line["skipped"] > job.train.max_skips:
    raise NotFiniteError(
      f"step {step}: {line['skipped']} steps were skipped, {job.train.max_skips} are allowed; "
      "lower the learning rate or look at events.jsonl"
    )
  in_a_row = int(metrics["in_a_row"])
  if in_a_row >= job.train.recovery.patience:
    first = step - in_a_row - between + 1
    raise HarmError(Harm(step, dispatched.drawn.number, in_a_row, why, first))


def _check_drops(job: Job, line: dict[str, Any]) -> None:
  """Ends the run where a layer has dropped more than it may."""
  for depth, limit in job.drop_limits.items():
    rate = line["layers"][str(depth)]["drop_rate"]
    if rate is not None and rate > limit:
      raise DropError(
        f"step {line['step']}: layer {depth} dropped {rate:.2%} of its choices, at most "
        f"{limit:.2%} are allowed; start anew with more room for experts (factor, bound) or with a "
        "larger max_drop_rate"
      )


def _shown(why: str) -> str:
  return "far above the last ones" if why == "spike" else why


def _clock(job: Job, dispatched: _Dispatched, tokens: float, until_s: float) -> dict[str, Any]:
  """Returns the `time` entry of a line; speeds count waiting for data as a part of the step.

  A checkpoint's stall is in the line after it, since the line of its step comes first.
  """
  seconds = job.observers.clock.take("step", until_s)
  step_s = max(seconds["step"] + seconds.get("data", 0.0), 1e-9)
  busy_s = dispatched.drawn.busy_s - dispatched.since_busy_s
  rates = job.rates
  return {
    "unix_s": round(time.time(), 3),
    "tokens_per_s": round(tokens / step_s, 1),
    "mfu": round(rates.flops_per_step / step_s / rates.peak_flops_per_s, 4),
    "data_share": round(busy_s / step_s, 4),
    "data_mb_per_s": round(dispatched.drawn.mb_per_s, 3),
    "seconds": seconds,
  }
