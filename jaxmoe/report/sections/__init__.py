"""The sections of a report, in order: a title and what makes it, None where there is nothing."""

from collections.abc import Callable

from jaxmoe.report.html import Html
from jaxmoe.report.run_data import RunData
from jaxmoe.report.sections.data_section import data
from jaxmoe.report.sections.domains_and_experts import routing
from jaxmoe.report.sections.event_table import happened
from jaxmoe.report.sections.expert_load import experts
from jaxmoe.report.sections.run_config import recipe
from jaxmoe.report.sections.text_samples import texts
from jaxmoe.report.sections.training_curves import learning
from jaxmoe.report.sections.wall_time import wall_time

SECTIONS: dict[str, Callable[[RunData], Html | None]] = {
  "Learning": learning,
  "Experts": experts,
  "Domains and experts": routing,
  "Data": data,
  "Wall time": wall_time,
  "Samples": texts,
  "Events": happened,
  "Config": recipe,
}
