"""The data of a report: a run as its files tell it, in one pass over metrics.jsonl.

Every picture is made from metrics.jsonl and events.jsonl alone; eval.json, where there is one, has
the scores; samples.md and config.json are shown as they are. Nothing here writes, and no file has
to be there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from jaxmoe.report.downsample import Curve, CurveSampler, LoadHistory, LoadSampler
from jaxmoe.report.expert_deaths import Death, DeathTracker
from jaxmoe.report.number_format import counted, finite
from jaxmoe.report.run_lines import (
  FinalScores,
  MetricsLine,
  StepScores,
  count_lines,
  parse_event,
  parse_line,
  parse_scores,
  read_objects,
)  # fmt: skip
from jaxmoe.report.sample_texts import SampleTexts, parse_samples
from jaxmoe.train.goodput import Goodput, goodput
from jaxmoe.train.held_out_slice import HeldOutSlice, slice_of
from jaxmoe.train.lock import is_held

ENDS = ("done", "stopped", "failed", "stalled")


@dataclasses.dataclass(frozen=True)
class RunData:
  """A run as its files tell it.

  Attributes:
    name: What its workdir is called.
    state: 'done', 'stopped', 'failed', 'running', 'ended without a word' or 'not started'.
    step: The last one with a line.
    tokens: Trained on so far.
    unit: Of the x of everything: 'tokens', or 'steps' for a run without token counts.
    curves: By name; those of a layer are called `layers/0/load_entropy`.
    loads: By layer.
    evaluations: (tokens so far, scores), in order.
    at: The x of some steps: of every event with a step and of every death.
    data: What was handed out of each domain, from the last line that says so.
    last: The last line of a step with labels.
    unlabelled: Steps in which no token had a label.
    slice: What part of held-out text evaluations are of.
    whole: The scores of all of it, where `jaxmoe evaluate` made them.
    unread: Lines of both files that could not be read.
  """

  name: str
  state: str
  step: int
  tokens: float
  unit: str
  curves: dict[str, Curve]
  loads: dict[int, LoadHistory]
  evaluations: list[tuple[float, StepScores]]
  deaths: list[Death]
  at: dict[int, float]
  data: dict[str, dict[str, float]]
  last: MetricsLine | None
  unlabelled: int
  slice: HeldOutSlice
  whole: FinalScores | None
  events: list[dict[str, Any]]
  goodput: Goodput | None
  config: Any
  samples: list[SampleTexts]
  unread: int

  def event(self, kind: str) -> dict[str, Any]:
    """Returns the last event of a kind, {} if there is none."""
    return next((event for event in reversed(self.events) if event["event"] == kind), {})

  def overall(self, one: StepScores) -> float:
    """Returns the score of all domains together, each by its held-out bytes."""
    return finite(self.slice.overall(one.domains, one.bits_per_byte))

  def layer_curves(self, metric: str) -> dict[int, Curve]:
    """Returns the curve of a metric for each layer that has it."""
    named = {f"layers/{layer}/{metric}": layer for layer in self.loads}
    return {named[name]: curve for name, curve in self.curves.items() if name in named}

  @property
  def ends(self) -> tuple[float, float]:
    """Where the x of every chart begins and ends."""
    return 0.0, self.tokens if self.unit == "tokens" else float(self.step)

  def tokens_at(self, step: int) -> str:
    """Returns how many tokens had been seen at a step, as text."""
    return counted(self.at.get(step, math.nan))


def read_run_data(workdir: pathlib.Path) -> RunData:
  """Returns what the files of a workdir tell; never raises for what stands in them."""
  parsed = [parse_event(plain) for plain in read_objects(workdir / "events.jsonl")]
  events = [event for event in parsed if event is not None]
  metrics = workdir / "metrics.jsonl"
  total = count_lines(metrics)
  watch = _RunScanner(total)
  stream = watch.lines(metrics, total)
  spent = _spent(stream, events)
  for _ in stream:  # what the count of seconds did not read
    pass
  watch.curves.flush()
  deaths = watch.deaths.found()
  steps = [event.get("step") for event in events] + [death.step for death in deaths]
  text, config = _text(workdir / "samples.md") or "", _json(workdir / "config.json")
  starts = [event for event in events if event["event"] == "start"]
  known = watch.tokens > 0
  return RunData(
    name=workdir.absolute().name or str(workdir), state=_state(workdir, events),
    step=watch.step, tokens=watch.tokens if known else math.nan,
    unit="tokens" if known else "steps",
    curves=watch.curves.found, loads=watch.loads.found(), evaluations=watch.evaluations,
    deaths=deaths, at=watch.x_at(steps), data=watch.data, last=watch.last,
    unlabelled=int(watch.unlabelled),
    slice=slice_of(starts[-1] if starts else {}, config),
    whole=parse_scores(_json(workdir / "eval.json")),
    events=events, goodput=spent, config=config, samples=parse_samples(text),
    unread=watch.unread + parsed.count(None),
  )  # fmt: skip


class _RunScanner:
  """Gathers everything in one pass over the lines."""

  def __init__(self, total: int):
    self.curves, self.loads, self.deaths = CurveSampler(total), LoadSampler(total), DeathTracker()
    self.evaluations: list[tuple[float, StepScores]] = []
    self.step, self.tokens, self.unread = 0, 0.0, 0
    self.data: dict[str, dict[str, float]] = {}
    self.last: MetricsLine | None = None
    self.unlabelled = 0.0
    self._steps, self._x = [0], [0.0]
    self._experts: dict[int, int] = {}

  def lines(self, path: pathlib.Path, total: int) -> Iterator[dict[str, Any]]:
    """Yields what the lines say of time, after taking in everything else."""
    for plain in read_objects(path, total):
      line = parse_line(plain)
      if line is None or line.step <= self.step or not self._fits(line):
        self.unread += 1
        continue
      self._take(line)
      yield {"step": line.step, "time": line.time}

  def x_at(self, steps: list[Any]) -> dict[int, float]:
    """Returns the x of those of the given steps that have been reached."""
    known = [s for s in steps if type(s) is int and 0 <= s <= self.step]
    return {s: self._x[bisect_left(self._steps, s)] for s in known}

  def _fits(self, line: MetricsLine) -> bool:
    """Whether layers have as many experts as before."""
    return all(self._experts.setdefault(n, len(of)) == len(of) for n, of in line.loads.items())

  def _take(self, line: MetricsLine) -> None:
    before = self._x[-1]
    self.last = self.last if line.scalars.get("labels") == 0 else line
    unlabelled = line.scalars.get("unlabelled", 0.0)
    self.unlabelled = unlabelled if math.isfinite(unlabelled) else self.unlabelled
    tokens = line.scalars.get("tokens", 0.0)
    missing = line.step - self.step  # more than 1 where lines are missing
    self.tokens += (tokens if math.isfinite(tokens) else 0.0) * missing
    self.step = line.step
    x = self.tokens or float(line.step)
    self._steps.append(line.step)
    self._x.append(x)
    values = dict(line.scalars)
    for layer, scalars in line.layers.items():
      values |= {f"layers/{layer}/{name}": value for name, value in scalars.items()}
    values |= {f"time/{name}": v for name, v in line.time.items() if isinstance(v, float)}
    self.curves.add(x, values)
    self.loads.add(before, x, line.loads)
    self.deaths.add(line.step, line.loads)
    self.data = line.data or self.data
    if line.evaluation is not None:
      self.evaluations.append((x, line.evaluation))


def _spent(lines: Iterator[dict[str, Any]], events: list[dict[str, Any]]) -> Goodput | None:
  """Returns where wall time went, None where the events do not say it."""
  try:
    spent = goodput(lines, events)
  except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
    return None
  return spent if math.isfinite(spent.wall_s) and spent.wall_s > 0 else None


def _state(workdir: pathlib.Path, events: list[dict[str, Any]]) -> str:
  kinds = [event["event"] for event in events if event["event"] in (*ENDS, "process", "start")]
  if kinds and kinds[-1] in ENDS:
    return kinds[-1]
  pid = next((event.get("pid") for event in reversed(events) if event.get("pid")), None)
  if is_held(workdir / "lock", pid if isinstance(pid, int) else None):
    return "running"
  return "ended without a word" if kinds else "not started"


def _text(path: pathlib.Path) -> str | None:
  with contextlib.suppress(OSError):
    return path.read_bytes().decode("utf-8", errors="replace")
  return None


def _json(path: pathlib.Path) -> Any:
  with contextlib.suppress(ValueError, TypeError, RecursionError):
    return json.loads(_text(path) or "null")
  return None


def unix_s(event: dict[str, Any]) -> float:
  """Returns when something happened, NaN if it is not said."""
  return finite(event["time"].get("unix_s"))
