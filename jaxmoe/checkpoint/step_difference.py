"""Two steps told apart array by array; digests tell which arrays have to be read at all."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmoe.checkpoint.step_reader import StepReader


@dataclasses.dataclass(frozen=True)
class ArrayDifference:
  """An array that two steps do not have alike.

  Attributes:
    name: Canonical.
    what: Where it is missing, or which shapes or dtypes differ; empty where values do.
    num_values: How many values differ.
    largest: The largest absolute difference; NaN where one of them is none.
    relative: The norm of the difference over the norm of the first's; inf where that is 0.
  """

  name: str
  what: str = ""
  num_values: int = 0
  largest: float = 0.0
  relative: float = 0.0


def differences(one: StepReader, other: StepReader) -> Iterator[ArrayDifference]:
  """Yields what differs, in order of names, with one pair of arrays in memory at a time.

  Raises:
    DamagedStepError: one that has to be read is not as it was written.
  """
  ours, theirs = one.manifest.arrays, other.manifest.arrays
  for name in sorted({*ours, *theirs}):
    a, b = ours.get(name), theirs.get(name)
    if a == b:
      continue
    if a is None or b is None:
      yield ArrayDifference(name, f"only in {(one if b is None else other).where}")
    elif (a.shape, a.dtype) != (b.shape, b.dtype):
      yield ArrayDifference(name, f"{a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}")
    else:
      yield _compared(name, one.read(name), other.read(name))


def record_differences(one: dict[str, Any], other: dict[str, Any], path: str = "") -> list[str]:
  """Returns the paths, such as `config.train.seed`, at which two records differ."""
  found = []
  for key in sorted({*one, *other}):
    a, b = one.get(key), other.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      found += record_differences(a, b, f"{path}{key}.")
    elif a != b:
      found.append(f"{path}{key}")
  return found


def _compared(name: str, one: np.ndarray, other: np.ndarray) -> ArrayDifference:
  kind = np.complex128 if np.iscomplexobj(one) else np.float64
  a, b = one.astype(kind), other.astype(kind)
  off, size = np.abs(a - b), float(np.linalg.norm(a))
  changed = int(np.sum((a != b) & ~(np.isnan(a) & np.isnan(b))))
  relative = float(np.linalg.norm(off)) / size if size else float("inf")
  return ArrayDifference(name, "", changed, float(np.max(off)), relative)
