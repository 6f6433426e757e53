"""Comparison of runs: curves laid over each other, a table of figures, config differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxmoe.report.card_grid import grid
from jaxmoe.report.chart import Axes, Series, chart, of_curve
from jaxmoe.report.headline import figures
from jaxmoe.report.html import Html, join, table, tag
from jaxmoe.report.number_format import short
from jaxmoe.report.run_data import RunData
from jaxmoe.report.sections.expert_load import FROM_ZERO as PER_LAYER_FROM_ZERO
from jaxmoe.report.sections.expert_load import PER_LAYER, deaths
from jaxmoe.report.sections.run_config import ABSENT, flat
from jaxmoe.report.sections.training_curves import domains

CURVES = {
  "loss": ("Training loss", "nats per token", "xy"),
  "grad_norm": ("Gradient norm", "", "y"),
  "learning_rate": ("Learning rate", "", "y"),
  "time/tokens_per_s": ("Speed", "tokens per second", "y"),
}
FROM_ZERO = ("learning_rate", "time/tokens_per_s", *PER_LAYER_FROM_ZERO)


def comparison(runs: Sequence[RunData]) -> Html:
  """Returns the body of a page that compares runs."""
  runs = _named_apart(runs)
  died = [join(tag("h3", run.name), deaths(run, most=6)) for run in runs if run.deaths]
  unit = "tokens" if all(run.unit == "tokens" for run in runs) else "steps or tokens"
  axes = Axes(unit, ends=(0.0, max(run.ends[1] for run in runs)))
  learned = [_curve(runs, name, axes) for name in CURVES]
  balance = [_mean_over_layers(runs, metric, axes) for metric in PER_LAYER]
  return join(
    tag("h1", f"{len(runs)} runs"), _table(runs), *died,
    tag("h2", "Learning"), grid(learned[0], *_held_out(runs, axes), *learned[1:]),
    tag("h2", "Experts, mean over layers"), grid(*balance) or tag("p", "no numbers yet"),
    tag("h2", "Configs"), _configs(runs),
  )  # fmt: skip


def _named_apart(runs: Sequence[RunData]) -> list[RunData]:
  """Returns runs with numbers behind the names that several have."""
  names = [run.name for run in runs]
  return [
    dataclasses.replace(run, name=f"{run.name} ({i + 1})") if names.count(run.name) > 1 else run
    for i, run in enumerate(runs)
  ]


def _table(runs: Sequence[RunData]) -> Html:
  known = [figures(run) for run in runs]
  names = list(dict.fromkeys(name for shown in known for name in shown))
  is_whole = all(run.whole is not None for run in runs)
  last = [_last_scores(run, is_whole) for run in runs]
  scored = list(dict.fromkeys(name for of in last for name in of))
  rows = []
  for run, shown, scores in zip(runs, known, last):
    found = [short(scores.get(domain, math.nan)) for domain in scored]
    rows.append([run.name, run.state, *(shown.get(name, "-") for name in names), *found])
  title = "Held out" if is_whole else _title(runs)
  return table(["run", "state", *names, *(f"{title}: {name}" for name in scored)], rows)


def _last_scores(run: RunData, is_whole: bool) -> dict[str, float]:
  """Returns bits per byte by domain: of eval.json, or of what was scored on the way."""
  if is_whole and run.whole is not None:
    return run.whole.domains
  return run.evaluations[-1][1].domains if run.evaluations else {}


def _title(runs: Sequence[RunData]) -> str:
  """Returns what scores on the way are called: slices, if any run scored one."""
  titles = {run.slice.title for run in runs if run.evaluations}
  return titles.pop() if len(titles) == 1 else "Held-out slice"


def _shown(title: str, series: Sequence[Series], axes: Axes) -> Html | None:
  """Returns a chart, None where no run has a number for it."""
  known = [one for one in series if any(math.isfinite(y) for y in one.y)]
  return chart(title, known, axes) if known else None


def _curve(runs: Sequence[RunData], name: str, axes: Axes) -> Html | None:
  title, y, log = CURVES[name]
  found = [(i, run.name, run.curves[name]) for i, run in enumerate(runs) if name in run.curves]
  series = [of_curve(label, curve, i) for i, label, curve in found]
  axes = dataclasses.replace(axes, y=y, log=log, from_zero=name in FROM_ZERO)
  return _shown(title, series, axes)


def _held_out(runs: Sequence[RunData], axes: Axes) -> list[Html | None]:
  """A chart for all domains together and one for each."""
  axes = dataclasses.replace(axes, y="bits per byte")

  def series(domain: str | None) -> list[Series]:
    return [
      Series(run.name, [x for x, _ in run.evaluations], [
        run.overall(one) if domain is None else one.domains.get(domain, math.nan)
        for _, one in run.evaluations
      ], color=i)
      for i, run in enumerate(runs)
    ]  # fmt: skip

  scored = list(dict.fromkeys(name for run in runs for name in domains(run)))
  title = _title(runs)
  cards = [_shown(f"{title}, all domains", series(None), axes)]
  return cards + [_shown(f"{title}: {name}", series(name), axes) for name in scored]


def _mean_over_layers(runs: Sequence[RunData], metric: str, axes: Axes) -> Html | None:
  series = []
  for i, run in enumerate(runs):
    curves = list(run.layer_curves(metric).values())
    if curves:
      length = min(len(curve.y) for curve in curves)
      y = np.mean([curve.y[:length] for curve in curves], 0).tolist()
      last = float(np.mean([curve.last for curve in curves]))
      series.append(Series(run.name, curves[0].x[:length], y, color=i, last=last))
  title, unit = PER_LAYER[metric]
  return _shown(title, series, dataclasses.replace(axes, y=unit, from_zero=metric in FROM_ZERO))


def _configs(runs: Sequence[RunData]) -> Html:
  """The fields in which configs differ."""
  known = [flat(run.config) for run in runs]
  paths = list(dict.fromkeys(path for one in known for path in one))
  rows = [
    [path, *(one.get(path, ABSENT) for one in known)]
    for path in paths if len({repr(one.get(path, ABSENT)) for one in known}) > 1
  ]  # fmt: skip
  if not rows:
    return tag("p", "The configs are equal.")
  return table(["field", *(run.name for run in runs)], rows)
