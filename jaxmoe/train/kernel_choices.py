"""Back ends that a run is computed by: checked before anything compiles, told at its start."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxmoe.core.backends import Choice
from jaxmoe.core.layout import Layout
from jaxmoe.models.transformer import Decoder
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.observers import Observers
from jaxmoe.train.run_log import read_lines
from jaxmoe.train.sharded_gradients import context_of
from jaxmoe.train.step import abstract_batch, abstract_state, build_train_step
from jaxmoe.train.train_state import StateSpec


def check_kernels(
  experiment: Experiment, decoder: Decoder, spec: StateSpec, layout: Layout
) -> None:
  """Refuses a back end that the recipe names and that does not fit its step.

  Nothing is compiled; the step is traced, unless the recipe names none: then something fits.

  Raises:
    InputError: why, and the names of those that fit.
  """
  if experiment.kernels.asked:
    context = context_of(decoder, experiment.parallel, layout)
    step = build_train_step(experiment, decoder, context, spec.masters)
    jax.eval_shape(step, abstract_state(spec), abstract_batch(experiment, layout))


def tell_kernels(observers: Observers, events: pathlib.Path, choices: Sequence[Choice]) -> None:
  """Tells what the step is computed by, a line each, and what is otherwise than it was.

  Args:
    observers: Who is told.
    events: events.jsonl, which says what the process before chose.
    choices: Those of the step.
  """
  before = last_told(read_lines(events))
  chosen = [{"operation": one.operation, "backend": one.backend, "why": one.why} for one in choices]
  now, then = by_operation(chosen), by_operation(before)
  changed = {name: then[name] for name in now if name in then and then[name] != now[name]}
  event_fields: dict[str, Any] = {"chosen": chosen}
  if changed:
    event_fields["changed"] = changed
  observers.log.event("kernels", **event_fields)
  for choice in choices:
    observers.display.say(f"kernel {choice}")
  for name, was in changed.items():
    observers.display.say(
      f"kernel {name} was {' and '.join(was)}: from here on numbers may differ by rounding"
    )


def last_told(events: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
  """Returns what the last event of its kind says was chosen; nothing where there is none."""
  chosen: list[dict[str, str]] = []
  for event in events:
    if event.get("event") == "kernels":
      chosen = event["chosen"]
  return chosen


def by_operation(chosen: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
  """Returns the back ends of each operation, each once, as layers may differ."""
  found: dict[str, list[str]] = {}
  for one in chosen:
    names = found.setdefault(one["operation"], [])
    if one["backend"] not in names:
      names.append(one["backend"])
  return found
