"""The sections of a report, in order: a title and what makes it, None where there is nothing."""

from collections.abc import Callable

from jaxmoe.report.html import Html
from jaxmoe.report.run_data import RunData
from jaxmoe.report.sections.data_section import data_section
from jaxmoe.report.sections.domains_and_experts import domains_and_experts
from jaxmoe.report.sections.event_table import event_table
from jaxmoe.report.sections.expert_load import expert_load
from jaxmoe.report.sections.run_config import run_config
from jaxmoe.report.sections.text_samples import text_samples
from jaxmoe.report.sections.training_curves import training_curves
from jaxmoe.report.sections.wall_time import wall_time

SECTIONS: dict[str, Callable[[RunData], Html | None]] = {
  "Learning": training_curves,
  "Experts": expert_load,
  "Domains and experts": domains_and_experts,
  "Data": data_section,
  "Wall time": wall_time,
  "Samples": text_samples,
  "Events": event_table,
  "Config": run_config,
}
