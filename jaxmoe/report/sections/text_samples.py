"""Text samples of the model at the start, half-way and at the end."""

from __future__ import annotations

from jaxmoe.report.card_grid import grid
from jaxmoe.report.html import Html, join, tag
from jaxmoe.report.run_data import RunData
from jaxmoe.report.sample_texts import SampleTexts, start_half_end

MAX_CHARACTERS = 2000


def text_samples(run: RunData) -> Html | None:
  """Returns the samples of three steps side by side."""
  chosen = start_half_end(run.samples)
  if not chosen:
    return None
  return grid(*(_column(when, sample) for when, sample in chosen))


def _column(when: str, sample: SampleTexts) -> Html:
  cut = [text[:MAX_CHARACTERS] + (" …" if text[MAX_CHARACTERS:] else "") for text in sample.texts]
  head = tag("b", f"{when.capitalize()}: step {sample.step}")
  return tag("div", head, join(*(tag("pre", text) for text in cut)))
