"""Training curves: loss, held-out bits per byte beside compressors, rates and balance losses."""

from __future__ import annotations

import math
from typing import Any

from jaxmoe.report.card_grid import folded_cards, grid
from jaxmoe.report.chart import Axes, ReferenceLine, Series, chart, of_curve
from jaxmoe.report.html import Html, join, table, tag
from jaxmoe.report.number_format import counted, finite, short
from jaxmoe.report.run_data import RunData
from jaxmoe.report.run_lines import levels
from jaxmoe.train.held_out_slice import KEY as SLICE

STEADY = (
  "loss", "total_loss", "grad_norm", "learning_rate", "skipped", "tokens", "labels", "unlabelled",
)  # fmt: skip
SHOWN = 9  # charts of held-out scores before the others are folded away
MARKED = ("skipped", "rollback", "resume", "save_failed")


def training_curves(run: RunData) -> Html:
  """Returns charts of loss, held-out scores, learning rate, gradient norm and balance losses."""
  marks = [
    (run.at[event["step"]], f"{event['event']} at step {event['step']}")
    for event in run.events
    if event["event"] in MARKED and type(event.get("step")) is int and event["step"] in run.at
  ][:200]
  cards = [
    _curve(run, "loss", "Training loss", "nats per token", log="xy", marks=marks),
    _curve(run, "grad_norm", "Gradient norm", "", log="y", marks=marks),
    _curve(run, "learning_rate", "Learning rate", "", zero=True),
  ]
  balance = [
    name for name in run.curves if name not in STEADY and "/" not in name
  ]
  cards += [_curve(run, name, f"Balance loss {name}") for name in balance]
  note = (
    "Points are means over neighbouring steps where there are many; the band goes from their "
    "least to their largest. Triangles mark restarts, skipped steps and rollbacks."
  )
  if run.evaluations and not run.slice.is_whole:
    note += (
      f" What is scored on the way is {run.slice.name}: another number than that of all of it, "
      "which jaxmoe evaluate makes. Compressors get the slice behind the rest as one stream."
    )
  scored = held_out(run)
  return join(
    grid(cards[0], *scored[:SHOWN], *cards[1:]), folded_cards(scored[SHOWN:], "domains"),
    tag("p", note, class_="note"), _domains(run),
  )  # fmt: skip


def held_out(run: RunData) -> list[Html]:
  """Returns a chart of held-out bits per byte for all domains together, then one for each.

  Of runs that scored a slice: curves and compressors are of the slice.
  """
  x = [tokens for tokens, _ in run.evaluations]
  axes = Axes(run.unit, "bits per byte", ends=run.ends)
  overall, title = [run.overall(one) for _, one in run.evaluations], run.slice.title
  cards = [chart(f"{title}, all domains", [Series("", x, overall)], axes)]
  baselines = compressors(run)
  for domain in domains(run):
    y = [one.domains.get(domain, math.nan) for _, one in run.evaluations]
    others = [ReferenceLine(name, of[domain]) for name, of in baselines.items() if domain in of]
    cards.append(chart(f"{title}: {domain}", [Series("", x, y)], axes, others))
  return cards


def domains(run: RunData) -> list[str]:
  """Returns the domains that were ever scored, in order."""
  return list(dict.fromkeys(name for _, one in run.evaluations for name in one.domains))


def compressors(run: RunData) -> dict[str, dict[str, float]]:
  """Returns {compressor: {domain: bits per byte}} of the slice, as the start of the run says it.

  Older runs say it of a stream that is the slice alone, in which compressors know little; that is
  in the name, or the lead over them would seem to be that on all held-out text.
  """
  data_fields = _get(run.event("start"), "data")
  comparable = run.slice.is_whole or SLICE in data_fields
  return {
    name if comparable else f"{name} (short stream)": of
    for name, of in levels(data_fields.get("compressors")).items()
  }


def _get(plain: dict[str, Any], *path: str) -> dict[str, Any]:
  for name in path:
    inner = plain.get(name)
    plain = inner if isinstance(inner, dict) else {}
  return plain


def _curve(
  run: RunData, name: str, title: str, unit: str = "", log: str = "", zero: bool = False,
  marks: list[tuple[float, str]] | None = None,
) -> Html:  # fmt: skip
  curve = run.curves.get(name)
  series = [of_curve("", curve)] if curve else []
  axes = Axes(run.unit, unit, log, from_zero=zero, ends=run.ends)
  return chart(title, series, axes, marks=marks or ())


def _domains(run: RunData) -> Html | None:
  """A row for each domain: what was handed out of it, and how much there is."""
  if not run.data:
    return None
  there = _get(run.event("start"), "data", "domains")
  total = sum(of.get("tokens", 0.0) for of in run.data.values()) or 1.0
  rows = []
  for name, of in run.data.items():
    tokens, epochs, read = (of.get(key, math.nan) for key in ("tokens", "epochs", "bytes"))
    kept = [finite(_get(there, name, part).get("bytes")) for part in ("train", "held_out")]
    sizes = [counted(size) for size in (read, *kept)]
    rows.append([name, counted(tokens), f"{100 * tokens / total:.1f}%", short(epochs, 3), *sizes])
  head = ["trained on", "tokens", "share", "epochs", "bytes", "bytes there", "bytes held out"]
  return table(head, rows)
