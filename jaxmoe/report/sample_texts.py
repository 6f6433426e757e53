"""Samples: the texts a model wrote on the way, from samples.md."""

from __future__ import annotations

import dataclasses
import re

_FENCE = re.compile(r"(`{3,})text")
_HEADING = re.compile(r"## step (\d+)")


@dataclasses.dataclass(frozen=True)
class SampleTexts:
  """What was written at a step, a text for each prompt."""

  step: int
  texts: tuple[str, ...]


def parse_samples(text: str) -> list[SampleTexts]:
  """Returns the sections of samples.md; a torn last text is returned as far as it goes."""
  found: list[tuple[int, list[str]]] = []
  fence, lines = "", []  # type: ignore[var-annotated]
  for line in text.split("\n"):  # "\r" is part of a text, not the end of a line
    if fence:  # what the model wrote may look like a heading
      if line != fence:
        lines.append(line)
        continue
      found[-1][1].append("\n".join(lines))
      fence = ""
    elif (opening := _FENCE.fullmatch(line)) and found:
      fence, lines = opening[1], []
    elif heading := _HEADING.fullmatch(line):
      found.append((int(heading[1]), []))
  if fence:
    found[-1][1].append("\n".join(lines))
  return [SampleTexts(step, tuple(texts)) for step, texts in found]


def start_half_end(samples: list[SampleTexts]) -> list[tuple[str, SampleTexts]]:
  """Returns the first sample, the one nearest to half of the last one's step, and the last."""
  if len(samples) < 2:
    return [("start" if not sample.step else "so far", sample) for sample in samples]
  middle = samples[1:-1]
  chosen = [("start", samples[0]), ("end", samples[-1])]
  if middle:
    half = samples[-1].step / 2
    chosen.insert(1, ("half", min(middle, key=lambda sample: abs(sample.step - half))))
  return chosen
