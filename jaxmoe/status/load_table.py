"""The expert-load table: a line a MoE layer, with one sign for each expert or each few of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

SIGNS = 32
"""Most signs in a bar; with more experts a sign is the mean of neighbours."""

BLOCKS = "▁▂▃▄▅▆▇█"
LETTERS = ".:-=+*#@"
"""Eight heights, a quarter of the fair share each; from 1.75 times the fair share on the last."""

NEVER = "x"
_HEAD = f"{'layer':>5} {'load by expert':<{SIGNS}} {'entropy':>7} {'max.viol':>8}"
_HEAD += f" {'dead':>5} {'drops':>6} {'eff.k':>6}"


def load_table(
  layers: Mapping[str, Mapping[str, Any]], rows: int | None = None, signs: str = BLOCKS
) -> list[str]:
  """Returns the lines of the table, each at most 77 cells wide.

  Args:
    layers: `layers` of a line of metrics.jsonl.
    rows: Most lines for layers: the first and last, and the worst of the others; None for all.
    signs: Eight signs for a bar's heights, low to high.
  """
  names = sorted(layers, key=lambda name: (len(name), name))
  chosen = names if rows is None else _chosen(names, layers, max(rows, 5))
  lines, before = [_HEAD], -1
  for name in chosen:
    place = names.index(name)
    if place > before + 1:
      lines.append(f"{'...':>5} {place - before - 1} layers more even than the worst shown")
    lines.append(_row(name, layers[name], signs))
    before = place
  return [*lines, *_legend(layers, signs)]


def bar(load: Sequence[float], signs: str = BLOCKS) -> str:
  """Returns a sign for each expert, or for each group of neighbours: their load's mean height."""
  count = min(len(load), SIGNS)
  edges = [group * len(load) // count for group in range(count + 1)] if count else []
  groups = [load[first:last] for first, last in itertools.pairwise(edges)]
  return "".join(_sign(sum(group) / len(group) * len(load), signs) for group in groups)


def _sign(times_fair: float, signs: str) -> str:
  return signs[min(int(times_fair * 4), len(signs) - 1)] if times_fair > 0 else NEVER


def _chosen(names: list[str], layers: Mapping[str, Mapping[str, Any]], rows: int) -> list[str]:
  """Returns the first and last layers and the worst between them: `rows` with a line for gaps."""
  if len(names) <= rows:
    return names
  ends = max(rows // 4, 1)
  worst = max((rows - 2 * ends - 1) // 2, 1)
  between = sorted(names[ends:-ends], key=lambda name: _badness(layers[name]), reverse=True)
  kept = {*names[:ends], *names[-ends:], *between[:worst]}
  return [name for name in names if name in kept]


def _badness(layer: Mapping[str, Any]) -> tuple[float, float]:
  return layer.get("dead") or 0, layer.get("max_violation") or 0.0


def _row(name: str, layer: Mapping[str, Any], signs: str) -> str:
  load = [share or 0.0 for share in layer.get("load") or ()]
  cells = (
    f"{name[-5:]:>5} {bar(load, signs):<{SIGNS}}",
    _cell(layer, "load_entropy", 7, ".3f"),
    _cell(layer, "max_violation", 8, ".2f"),
    _cell(layer, "dead", 5, "d"),
    _cell(layer, "drop_rate", 6, ".1%"),
    _cell(layer, "effective_k", 6, ".2f"),
  )
  return " ".join(cells)


def _cell(layer: Mapping[str, Any], name: str, width: int, form: str) -> str:
  value = layer.get(name)
  if not isinstance(value, int | float):
    return f"{'-':>{width}}"
  return f"{int(value) if form == 'd' else value:>{width}{form}}"


def _legend(layers: Mapping[str, Mapping[str, Any]], signs: str) -> list[str]:
  experts = max((len(layer.get("load") or ()) for layer in layers.values()), default=0)
  fair = f"{signs[3]}{signs[4]} a fair share, {signs[-1]} 1.75 times it or more, {NEVER} no choice"
  several = f"; a sign is {-(-experts // SIGNS)} experts" if experts > SIGNS else ""
  return [f"{'':>5} {fair}{several}"]
