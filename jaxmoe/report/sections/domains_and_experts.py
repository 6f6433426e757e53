"""Domain x expert tables and their mutual information: whether routing knows the domains."""

from __future__ import annotations

import math

import numpy as np

from jaxmoe.report.card_grid import first_cards
from jaxmoe.report.chart import FEW, Axes, Series, chart
from jaxmoe.report.heatmap import HeatmapAxes, heatmap, legend
from jaxmoe.report.html import Html, join, tag
from jaxmoe.report.number_format import percent, short
from jaxmoe.report.run_data import RunData
from jaxmoe.report.run_lines import DomainRouting

CHANCE = 5  # the colour of what is not the model


def domains_and_experts(run: RunData) -> Html | None:
  """Returns for each layer where the tokens of each domain went last, and how that came about."""
  scored = [(x, one.routing) for x, one in run.evaluations if one.routing]
  if not scored:
    return None
  note = (
    "Rows are domains: where the choices of a domain's held-out tokens go, each row for itself. "
    "Mutual information is between a token's domain and its expert, 0 where routing ignores the "
    "domain. Chance is the middle 95% of the same figure with domains shuffled over rows of text: "
    "what lies inside is no sign of specialization."
  )
  layers = list(scored[-1][1])
  cards = [_normalized(run, scored)]
  labelled = len(layers) <= 8
  for layer in layers:
    cards += [_matrix(scored[-1][1][layer], layer, labelled), _information(run, scored, layer)]
  return join(tag("p", note), legend(), first_cards(cards, 13, "charts of layers"))


def _matrix(found: DomainRouting, layer: int, labelled: bool) -> Html:
  total_D1 = found.counts_DE.sum(1, keepdims=True)
  share_DE = found.counts_DE / np.where(total_D1 > 0, total_D1, np.nan)  # no share of no choice
  ratio_DE = share_DE * found.counts_DE.shape[1]
  names = [name if len(name) <= 12 else name[:11] + "…" for name in found.domains]
  left = min(max(30, 8 + 7 * max(map(len, names))), 96)
  low, high = found.shuffled
  verdict = "more than chance" if found.bits > high else "no more than chance"
  share = percent(found.normalized(found.bits))
  note = (
    f"{short(found.bits, 3)} bits, {share} of the most possible: {verdict} "
    f"({short(low, 3)} to {short(high, 3)})."
  )
  return heatmap(
    f"Domain x expert, layer {layer}", ratio_DE, HeatmapAxes(names, left=left), note, labelled
  )


def _information(
  run: RunData, scored: list[tuple[float, dict[int, DomainRouting]]], layer: int
) -> Html:
  known = [(x, tables[layer]) for x, tables in scored if layer in tables]
  x = [at for at, _ in known]
  low, high = ([one.shuffled[side] for _, one in known] for side in (0, 1))
  series = [
    Series("domain-expert", x, [one.bits for _, one in known]),
    Series("chance, 95% below", x, high, low, high, CHANCE),
  ]
  return chart(f"Mutual information, layer {layer}", series, Axes(run.unit, "bits", ends=run.ends))


def _normalized(run: RunData, scored: list[tuple[float, dict[int, DomainRouting]]]) -> Html:
  layers = sorted({layer for _, tables in scored for layer in tables})
  series = []
  for layer in layers:
    known = [(x, tables[layer]) for x, tables in scored if layer in tables]
    y = [one.normalized(one.bits) for _, one in known]
    series.append(Series(f"layer {layer}", [x for x, _ in known], y))
  axes = Axes(run.unit, "of min(H(domain), H(expert))", from_zero=True, ends=run.ends)
  if len(series) >= FEW:  # the charts of layers have it, each its own
    return chart("Mutual information, normalized", series, axes)
  chance = [
    [tables[n].normalized(tables[n].shuffled[1]) for n in tables] for _, tables in scored
  ]
  highest = [max(filter(math.isfinite, of), default=math.nan) for of in chance]
  zero = [0.0] * len(highest)
  x = [at for at, _ in scored]
  series.append(Series("chance, 95% below", x, highest, zero, highest, CHANCE))
  return chart("Mutual information, normalized", series, axes)
