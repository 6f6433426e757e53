"""Wall time by category, over all processes of a run, and how fast it was."""

from __future__ import annotations

import math

from jaxmoe.report.card_grid import grid
from jaxmoe.report.chart import Axes, chart, of_curve
from jaxmoe.report.html import Html, data, join, table, tag
from jaxmoe.report.number_format import finite, percent, plain, seconds
from jaxmoe.report.run_data import RunData

COLORS = {
  "step": "--s0", "data": "--s1", "evaluation": "--s2", "samples": "--l3", "checkpoint": "--s3",
  "compile": "--s4", "start": "--s5", "report": "--l7", "paused": "--l2", "lost": "--bad",
  "down": "--l0",
  "other": "--line",
}  # fmt: skip
MEANS = {
  "step": "training steps that stayed",
  "data": "waiting for a batch",
  "evaluation": "scoring held-out text",
  "samples": "writing samples",
  "checkpoint": "waiting for a checkpoint",
  "compile": "compiling",
  "start": "interpreter, imports, corpus, restoring",
  "report": "writing reports before this one",
  "paused": "the whole process was stopped, by a signal or its group",
  "lost": "work that was done again or thrown away",
  "down": "no process alive",
  "other": "not told as anything else",
}
RATES = {
  "time/tokens_per_s": ("Speed", "tokens per second"),
  "time/mfu": ("Model FLOPs utilization", "share of the matmul peak"),
  "time/data_share": ("Making batches", "busy share of the step, beside it"),
}


def wall_time(run: RunData) -> Html:
  """Returns a bar and a table of seconds by category, and charts of speed."""
  return join(_spent(run), grid(*(
    _rate(run, name, title, unit) for name, (title, unit) in RATES.items() if name in run.curves
  )))  # fmt: skip


def _rate(run: RunData, name: str, title: str, unit: str) -> Html:
  peak = run.event("compiled").get("time", {}).get("peak_flops_per_s")
  if name == "time/mfu" and math.isfinite(finite(peak)):
    unit = f"share of {finite(peak) / 1e9:,.0f} GFLOP/s"
  axes = Axes(run.unit, unit, "y", from_zero=True, ends=run.ends)
  return chart(title, [of_curve("", run.curves[name])], axes)


def _spent(run: RunData) -> Html:
  if run.goodput is None:
    return tag("p", "The events of this run do not say how its wall time was spent.")
  wall, spent = run.goodput.wall_s, run.goodput.seconds
  processes = sum(event["event"] == "process" for event in run.events)
  rows, pieces = [], []
  for name, value in spent.items():
    share = value / wall
    color = f"background:var({COLORS.get(name, '--line')})"
    if share > 0:
      title = f"{name}: {seconds(value)}, {percent(share)}"
      pieces.append(tag("i", style=f"{color};flex:{share:.5f} 1 0", title=title))
    swatch = tag("span", tag("i", style=color), name, class_="swatch")
    rows.append([swatch, MEANS.get(name, ""), seconds(value), percent(share)])
  count = "one process" if processes == 1 else f"{processes} processes"
  text = f"{seconds(wall)} of wall time over {count}; {percent(run.goodput.share)} was goodput: "
  numbers = {"chart": "wall time", "seconds": {n: plain(v) for n, v in spent.items()}}
  return join(
    tag("p", text, "steps that stayed", run.goodput.caveat, "."),
    tag("div", *pieces, class_="bar", role="img", aria_label="wall time by category"),
    table(["", "what", "time", "share"], rows, text_columns=2), data(numbers),
  )  # fmt: skip
