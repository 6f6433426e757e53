"""The headline of a report: where the run stands, in figures a person looks for first."""

from __future__ import annotations

import math

from jaxmoe.report.card_grid import tiles
from jaxmoe.report.html import Html, join, table, tag
from jaxmoe.report.number_format import counted, finite, percent, seconds, short
from jaxmoe.report.run_data import RunData
from jaxmoe.report.sections.expert_load import deaths
from jaxmoe.report.sections.run_config import flat
from jaxmoe.report.sections.training_curves import compressors, domains

GOOD = ("done", "running")


def heading(run: RunData) -> Html:
  """Returns the name of a run and its state."""
  mark = tag("span", run.state, class_="state" if run.state in GOOD else "state bad")
  return tag("h1", run.name, " ", mark)


def headline(run: RunData) -> Html:
  """Returns what a person looks for first: figures, who died, and scores by domain."""
  notes = (_failure(run), *_notes(run), deaths(run, most=6))
  return join(tiles(figures(run)), *notes, _scores(run))


def figures(run: RunData) -> dict[str, str]:
  """Returns the figures of a run, by name."""
  total = sum(len(of.last_E) for of in run.loads.values())
  spent = run.goodput
  return {
    "step": _steps(run),
    "tokens": counted(run.tokens),
    "parameters": counted(finite(run.event("start").get("params"))),
    "loss, nats/token": short(final_loss(run)),
    **held_out(run),
    "goodput": f"{percent(spent.share)}" if spent else "-",
    "wall time": seconds(spent.wall_s) if spent else "-",
    "dead experts": f"{len(run.deaths)} of {total}" if total else "-",
  }


def _steps(run: RunData) -> str:
  """Returns the last step and how many are planned, in as few letters as fit a tile."""
  planned = flat(run.config).get("train.num_steps")
  if not isinstance(planned, int):
    return f"{run.step:,}"
  shown = f"{run.step:,} of {planned:,}"
  return shown if len(shown) <= 16 else f"{counted(run.step, 4)} of {counted(planned, 4)}"


def held_out(run: RunData) -> dict[str, str]:
  """Returns bits per byte of all held-out text, from eval.json, and of the slice on the way."""
  all_of_it, found = "held-out bits/byte", {}
  if run.whole is not None:
    later = f" at step {run.whole.step:,}" if run.whole.step != run.step else ""
    found[all_of_it] = short(run.whole.bits_per_byte) + later
  if run.evaluations and not (run.slice.is_whole and found):
    name = all_of_it if run.slice.is_whole else "held-out slice, bits/byte"
    found[name] = short(run.overall(run.evaluations[-1][1]))
  return found or {all_of_it: "-"}


def final_loss(run: RunData) -> float:
  """Returns the loss of the last step with labels."""
  return run.last.scalars.get("loss", math.nan) if run.last else math.nan


def _notes(run: RunData) -> list[Html]:
  """Returns what is strange about the lines."""
  notes = []
  if run.unread:
    lines = "1 line" if run.unread == 1 else f"{run.unread} lines"
    notes.append(f"{lines} could not be read and are left out.")
  if run.unlabelled:
    had = f"{run.unlabelled:,} of {run.step:,} steps had no token with a label"
    notes.append(f"{had}: nothing was learned, and curves of what is learned leave them out.")
  return [tag("p", note, class_="note") for note in notes]


def _failure(run: RunData) -> Html | None:
  failed = run.event("failed") if run.state == "failed" else {}
  if not failed:
    return None
  return tag("div", tag("b", "Failed"), f" with exit code {failed.get('code', '?')}: ",
             failed.get("why", ""), class_="alert")  # fmt: skip


def _scores(run: RunData) -> Html | None:
  """Held-out bits per byte by domain, the best of each row in bold."""
  if run.whole is not None:
    scores, baselines = run.whole.domains, run.whole.compressors
    what = f"all held-out text at step {run.whole.step:,} (eval.json)"
  elif run.evaluations:
    scores, baselines, what = run.evaluations[-1][1].domains, compressors(run), run.slice.name
  else:
    return None
  rows = []
  for domain in list(scores) if run.whole is not None else domains(run):
    values = [scores.get(domain, math.nan)]
    values += [of.get(domain, math.nan) for of in baselines.values()]
    best = min((value for value in values if math.isfinite(value)), default=math.nan)
    cells = [tag("b", short(v)) if v == best and len(values) > 1 else short(v) for v in values]
    rows.append([domain, *cells])
  note = f"Bits per byte of {what}, lower is better; compressors get the same bytes as one stream"
  if run.whole is None and not run.slice.is_whole:
    note += ", behind what else is held out. jaxmoe evaluate scores all of it: another number"
  note += "."
  return join(table(["domain", "model", *baselines], rows), tag("p", note, class_="note"))
