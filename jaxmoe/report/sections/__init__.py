"""The sections of a report, in order: a title and what makes it, None where there is nothing."""

from collections.abc import Callable

from jaxmoe.report.html import Html
from jaxmoe.report.run import Run
from jaxmoe.report.sections.data import data
from jaxmoe.report.sections.experts import experts
from jaxmoe.report.sections.happened import happened
from jaxmoe.report.sections.learning import learning
from jaxmoe.report.sections.recipe import recipe
from jaxmoe.report.sections.routing import routing
from jaxmoe.report.sections.texts import texts
from jaxmoe.report.sections.wall_time import wall_time

SECTIONS: dict[str, Callable[[Run], Html | None]] = {
  "Learning": learning,
  "Experts": experts,
  "Domains and experts": routing,
  "Data": data,
  "Wall time": wall_time,
  "Samples": texts,
  "Events": happened,
  "Config": recipe,
}
