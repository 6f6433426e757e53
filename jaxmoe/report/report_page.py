"""report.html: one file that needs nothing else, neither a network nor a script."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from jaxmoe.core.output import write_atomic
from jaxmoe.report.headline import heading, headline
from jaxmoe.report.html import Html, join, tag
from jaxmoe.report.run_comparison import comparison
from jaxmoe.report.run_data import RunData, read_run_data
from jaxmoe.report.sections import SECTIONS
from jaxmoe.report.stylesheet import STYLE


def write_report(workdir: pathlib.Path, out: pathlib.Path | None = None) -> pathlib.Path:
  """Writes the report of a run, which may be alive, and returns where: DIR/report.html.

  What cannot be read in its files is left out and counted.

  Raises:
    OSError: the report cannot be written.
  """
  out = out or workdir / "report.html"
  write_atomic(out, report(read_run_data(workdir)))
  return out


def write_comparison(workdirs: Sequence[pathlib.Path], out: pathlib.Path) -> pathlib.Path:
  """Writes the curves of several runs laid over each other, with a table; returns `out`."""
  write_atomic(
    out, page("Comparison of runs", comparison([read_run_data(path) for path in workdirs]))
  )
  return out


def report(run: RunData) -> Html:
  """Returns the report of a run."""
  made = {title: section(run) for title, section in SECTIONS.items()}
  shown = {title: body for title, body in made.items() if body is not None}
  links = [tag("a", title, href=f"#{_anchor(title)}") for title in shown]
  sections = [
    tag("section", tag("h2", title), body, id=_anchor(title)) for title, body in shown.items()
  ]
  return page(run.name, join(heading(run), headline(run), tag("nav", *links), *sections))


def page(title: str, body: Html) -> Html:
  """Returns a whole page."""
  head = tag(
    "head", tag("meta", charset="utf-8"), tag("title", title),
    tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
    tag("meta", name="color-scheme", content="light dark"), tag("style", Html(STYLE)),
  )  # fmt: skip
  return join(Html("<!doctype html>\n"), tag("html", head, tag("body", body), lang="en"))


def _anchor(title: str) -> str:
  return title.lower().replace(" ", "-")
