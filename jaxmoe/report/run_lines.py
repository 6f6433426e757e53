"""Lines of the files of a run, read one by one; a strange one is left out and counted.

A run may be writing while it is read, may have died in the middle of a line, and may come from an
older version with fewer fields. `MetricsLine` is a line of metrics.jsonl with fields of the right
types.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmoe.report.number_format import finite
from jaxmoe.train.reverse_lines import parse


@dataclasses.dataclass(frozen=True)
class DomainRouting:
  """Where the tokens of each domain went in a layer, and whether that is more than chance."""

  domains: tuple[str, ...]
  counts_DE: np.ndarray
  bits: float
  shuffled: tuple[float, float]

  @property
  def ceiling(self) -> float:
    """The most that the information can be: min(H(domain), H(expert)), in bits."""
    return min(entropy(self.counts_DE.sum(1)), entropy(self.counts_DE.sum(0)))

  def normalized(self, bits: float) -> float:
    """Returns information as a share of the most it can be; NaN where that is 0."""
    return bits / self.ceiling if self.ceiling > 0 else math.nan


@dataclasses.dataclass(frozen=True)
class StepScores:
  """Held-out scores of a step, overall and by domain, and the routing of each layer."""

  bits_per_byte: float
  domains: dict[str, float]
  routing: dict[int, DomainRouting]


@dataclasses.dataclass(frozen=True)
class FinalScores:
  """What eval.json says: the scores of all held-out text at a step, beside those of compressors."""

  step: int
  bits_per_byte: float
  domains: dict[str, float]
  compressors: dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class MetricsLine:
  """A line of metrics.jsonl."""

  step: int
  scalars: dict[str, float]
  loads: dict[int, np.ndarray]
  layers: dict[int, dict[str, float]]
  data: dict[str, dict[str, float]]
  evaluation: StepScores | None
  time: dict[str, Any]


def read_objects(path: pathlib.Path, most: int | None = None) -> Iterator[dict[str, Any] | None]:
  """Yields the objects of a file of JSON lines, None for a line that is none."""
  try:
    with open(path, "rb") as file:
      for number, raw in enumerate(file):
        if number == most:
          return
        yield parse(raw)
  except OSError:
    return


def count_lines(path: pathlib.Path) -> int:
  """Returns the number of lines of a file, 0 if there is none."""
  try:
    with open(path, "rb") as file:
      return sum(1 for _ in file)
  except OSError:
    return 0


def parse_line(plain: dict[str, Any] | None) -> MetricsLine | None:
  """Returns a line of metrics.jsonl, None if it is not one."""
  try:
    return _line(plain or {})
  except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
    return None


def parse_scores(plain: Any) -> FinalScores | None:
  """Returns what eval.json holds, None if it holds no scores."""
  if not isinstance(plain, dict) or type(plain.get("step")) is not int:
    return None
  domains, others = plain.get("domains"), plain.get("compressors")
  found = _numbers(domains) if isinstance(domains, dict) else {}
  return FinalScores(plain["step"], finite(plain.get("bits_per_byte")), found, levels(others))


def levels(plain: Any) -> dict[str, dict[str, float]]:
  """Returns {compressor: {domain: bits per byte}} of what a file says of compressors."""
  of = plain.items() if isinstance(plain, dict) else ()
  return {str(name): _numbers(scores) for name, scores in of if isinstance(scores, dict)}


def parse_event(plain: dict[str, Any] | None) -> dict[str, Any] | None:
  """Returns a line of events.jsonl whose `event` is text and whose `time` is an object."""
  if plain is None or not isinstance(plain.get("event"), str):
    return None
  clock = plain.get("time")
  return {**plain, "time": clock if isinstance(clock, dict) else {}}


def entropy(counts: np.ndarray) -> float:
  """Returns the entropy of counts in bits."""
  share = counts[counts > 0] / max(counts.sum(), 1e-300)
  return float(-(share * np.log2(share)).sum())


def _line(plain: dict[str, Any]) -> MetricsLine:
  if type(plain["step"]) is not int or not 0 < plain["step"] < 2**53:
    raise ValueError("step")
  layers = {int(name): layer for name, layer in plain.get("layers", {}).items()}
  return MetricsLine(
    step=plain["step"],
    scalars={name: value for name, value in _numbers(plain).items() if name != "step"},
    loads={n: _load(layer["load"]) for n, layer in sorted(layers.items()) if "load" in layer},
    layers={n: _numbers(layer) for n, layer in sorted(layers.items())},
    data={str(name): _numbers(of) for name, of in plain.get("data", {}).items()},
    evaluation=_evaluation(plain["eval"]) if "eval" in plain else None,
    time=_clock(plain.get("time", {})),
  )


def _numbers(plain: dict[str, Any]) -> dict[str, float]:
  """Returns the numbers among fields; null is NaN, everything else is left out."""
  return {
    name: finite(value)
    for name, value in plain.items()
    if value is None or isinstance(value, (int, float))
  }


def _load(values: Any) -> np.ndarray:
  load_E = np.asarray(values, np.float32)
  if load_E.ndim != 1 or not load_E.size or not np.isfinite(load_E).all():
    raise ValueError("load")
  return load_E


def _evaluation(plain: dict[str, Any]) -> StepScores:
  routing = {int(name): _routing(of) for name, of in plain.get("routing", {}).items()}
  domains = _numbers(plain.get("domains", {}))
  return StepScores(finite(plain.get("bits_per_byte")), domains, dict(sorted(routing.items())))


def _routing(plain: dict[str, Any]) -> DomainRouting:
  counts_DE = np.asarray(list(plain["counts"].values()), np.float64)
  if counts_DE.ndim != 2 or not counts_DE.size or not np.isfinite(counts_DE).all():
    raise ValueError("counts")
  low, high = plain.get("shuffled_95") or (None, None)
  bits = finite(plain.get("mutual_information"))
  return DomainRouting(tuple(plain["counts"]), counts_DE, bits, (finite(low), finite(high)))


def _clock(plain: dict[str, Any]) -> dict[str, Any]:
  seconds = plain.get("seconds", {})
  known = {n: v for n, v in _numbers(seconds).items() if math.isfinite(v)}
  steady = {n: v for n, v in _numbers(plain).items() if math.isfinite(v)}
  return {**steady, "seconds": known}
