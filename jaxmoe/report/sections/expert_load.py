"""Expert load by layer and over time, experts that died and when, and balance over time."""

from __future__ import annotations

import numpy as np

from jaxmoe.report.card_grid import first_cards, grid
from jaxmoe.report.chart import Axes, chart, of_curve
from jaxmoe.report.expert_deaths import sentences
from jaxmoe.report.heatmap import HeatmapAxes, heatmap, legend
from jaxmoe.report.html import Html, fold, join, table, tag
from jaxmoe.report.number_format import percent, short
from jaxmoe.report.run_data import RunData

MAX_CELLS, MIN_COLUMNS = 80_000, 20
PER_LAYER = {
  "load_entropy": ("Load entropy", "share of log(experts)"),
  "max_violation": ("Maximum violation", "largest load / even - 1"),
  "dead": ("Experts without a choice", "in a step"),
  "drop_rate": ("Drop rate", "share of choices"),
  "effective_k": ("Effective k", "rows computed per token"),
  "router_z": ("Router z by layer", "mean squared logsumexp"),
}
FROM_ZERO = ("max_violation", "dead", "drop_rate", "effective_k")


def expert_load(run: RunData) -> Html | None:
  """Returns heatmaps of load, the experts that died, and each layer's balance over the run."""
  if not run.loads:
    return None
  return join(
    deaths(run), legend(), _over_time(run),
    tag("h3", "Balance of each layer"), grid(*(_per_layer(run, name) for name in PER_LAYER)),
    fold("Load of every expert over the last tenth of the steps", _table(run)),
  )  # fmt: skip


def deaths(run: RunData, most: int = 12) -> Html | None:
  """Returns in words who died and when, or that nobody did."""
  if not run.loads:
    return None
  total = sum(len(of.last_E) for of in run.loads.values())
  if not run.deaths:
    return tag("p", f"No expert died: each of {total} has had tokens in the last steps.")
  tokens = {death.step: run.tokens_at(death.step) for death in run.deaths}
  items = [tag("li", text) for text in sentences(run.deaths, tokens)]
  head = tag("b", f"{len(items)} of {total} experts {'is' if len(items) == 1 else 'are'} dead")
  rest = fold(f"{len(items) - most} more", tag("ul", *items[most:])) if items[most:] else None
  return tag("div", head, tag("ul", *items[:most]), rest, class_="alert")


def _by_layer(run: RunData) -> Html:
  """The layers x experts heatmap; layers with fewer experts than others end earlier."""
  widest = max(len(of.last_E) for of in run.loads.values())
  ratio_LE = np.full((len(run.loads), widest), np.nan)
  for i, of in enumerate(run.loads.values()):
    ratio_LE[i, : len(of.last_E)] = of.last_E * len(of.last_E)
  rows = [str(layer) for layer in run.loads]
  note = "Rows are layers by depth; mean over the last tenth of the steps."
  return heatmap("Load by layer", ratio_LE, HeatmapAxes(rows), note)


def _over_time(run: RunData) -> Html:
  """The layers x experts heatmap, and those of layers over time."""
  total = sum(len(of.last_E) for of in run.loads.values())
  columns = min(100, max(MIN_COLUMNS, MAX_CELLS // total))
  shown = list(run.loads)
  if total * columns > MAX_CELLS:  # those that are worst; all would make a page too large
    dead = {death.layer for death in run.deaths}
    worst = {n: (n in dead, (of.last_E * len(of.last_E)).max()) for n, of in run.loads.items()}
    room = MAX_CELLS // columns
    ranked, shown = sorted(shown, key=lambda n: worst[n], reverse=True), []
    for layer in ranked:
      room -= len(run.loads[layer].last_E)
      shown += [layer] if room >= 0 or not shown else []
  cards = [_history(run, layer, columns, labelled=len(shown) <= 4) for layer in sorted(shown)]
  text = f"Load over time of the {len(shown)} least even of {len(run.loads)} layers is shown."
  note = tag("p", text, class_="note") if len(shown) < len(run.loads) else None
  return join(first_cards([_by_layer(run), *cards], 9, "layers"), note)


def _history(run: RunData, layer: int, columns: int, labelled: bool) -> Html:
  ratio_EC, edges = run.loads[layer].ratios(columns)
  died = {death.expert: death.step for death in run.deaths if death.layer == layer}
  marks = {expert: f"expert {expert}: no token since step {step}" for expert, step in died.items()}
  since = [f"{e} (step {s}, {run.tokens_at(s)} {run.unit})" for e, s in died.items()]
  note = f"◂ no token since: {', '.join(since[:16])}{' …' if since[16:] else ''}" if since else ""
  names = [str(expert) for expert in range(len(ratio_EC))]
  sides = HeatmapAxes(names, run.unit, edges, marks=marks)
  return heatmap(f"Load over time, layer {layer}", ratio_EC, sides, note, labelled)


def _per_layer(run: RunData, metric: str) -> Html | None:
  curves = run.layer_curves(metric)
  if not curves:
    return None
  title, unit = PER_LAYER[metric]
  series = [of_curve(f"layer {n}", curve) for n, curve in curves.items()]
  axes = Axes(run.unit, unit, from_zero=metric in FROM_ZERO, ends=run.ends)
  return chart(title, series, axes)


def _table(run: RunData) -> Html:
  dead = {(death.layer, death.expert): death.step for death in run.deaths}
  rows = [
    [f"layer {layer}, expert {expert}", percent(float(share)), short(share * len(of.last_E), 3),
     f"step {dead[layer, expert]}" if (layer, expert) in dead else ""]
    for layer, of in run.loads.items() for expert, share in enumerate(of.last_E)
  ]  # fmt: skip
  shown = table(["expert", "load", "over even", "dead since"], rows[:1024])
  return join(shown, tag("p", f"and {len(rows) - 1024} more") if rows[1024:] else None)
