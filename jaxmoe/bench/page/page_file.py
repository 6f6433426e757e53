"""The page: races, rooflines, curves, and what others published, in one file without a script."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmoe.bench.page.growth_curves import charts, exponents
from jaxmoe.bench.page.published import published
from jaxmoe.bench.page.race_bars import STYLE, counts, races, strategies
from jaxmoe.bench.page.result_files import ResultFile
from jaxmoe.bench.page.rooflines import rooflines
from jaxmoe.report.card_grid import grid
from jaxmoe.report.html import Html, join, table, tag
from jaxmoe.report.report_page import page

RACES = (
  "Bars are seconds of the processor, which a busy machine leaves alone; contestants took turns, "
  "and each had given our values before. A ratio is the median over rounds of a contestant's over "
  "that of the bar in blue: above 1 it is slower."
)


def bench_page(files: Sequence[ResultFile]) -> Html:
  """Returns the whole page."""
  raced = [figure for file in files for figure in races(file)]
  swept = [file for file in files if file.suite == "scaling"]
  sections: dict[str, Html | None] = {
    "Races": join(tag("p", RACES), grid(*raced)) if raced else None,
    "Rooflines": grid(*found) if (found := rooflines(files)) else None,
    "Work of programs": counts(files),
    "Rows over devices": strategies(files),
    "How cost grows": join(*(join(grid(*charts(file)), exponents(file)) for file in swept))
    if swept else None,
    "Published by others": published(),
  }  # fmt: skip
  shown = {title: body for title, body in sections.items() if body is not None}
  anchors = {title: title.lower().replace(" ", "-") for title in shown}
  links = [tag("a", title, href=f"#{anchor}") for title, anchor in anchors.items()]
  parts = [
    tag("section", tag("h2", title), body, id=anchors[title]) for title, body in shown.items()
  ]
  style = tag("style", Html(STYLE))
  return page(
    "Benchmarks", join(style, tag("h1", "Benchmarks"), _machines(files), tag("nav", *links), *parts)
  )


def _machines(files: Sequence[ResultFile]) -> Html:
  """Returns the table of where and when each file was made."""
  rows = []
  for file in files:
    about = file.about
    kind = about["processor"] or about["device"]
    others = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    rows.append([
      file.suite + ("" if file.finished else " (unfinished)"),
      f"{kind}, {about['cores']:g} cores", ", ".join(filter(None, [f"jax {about['jax']}", others])),
      file.date[:10],
    ])  # fmt: skip
  return table(["suite", "machine", "versions", "date"], rows, 3)
