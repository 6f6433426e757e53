"""Arguments of the library, checked: paths, counts, settings and ids; or one line of a mistake."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.models.generate import Sampling

Path = str | os.PathLike[str]
_NUMBERS = {"int": int, "float": int | float}


def as_path(value: Any, name: str) -> str:
  """Returns a path as text.

  Raises:
    InputError: it is no path.
  """
  if not isinstance(value, str | os.PathLike) or not os.fspath(value):
    raise InputError(f"{name}={value!r}: expected a path, such as 'runs/a'")
  return str(os.fspath(value))


def as_count(value: Any, name: str) -> int:
  """Returns a whole number.

  Raises:
    InputError: it is none.
  """
  if isinstance(value, bool) or not isinstance(value, int | np.integer):
    raise InputError(f"{name}={value!r}: expected a whole number")
  return int(value)


def as_sampling(settings: dict[str, Any]) -> Sampling:
  """Returns how tokens are drawn.

  Raises:
    InputError: there is no such setting, or a value that is no number or out of range.
  """
  known = {field.name: str(field.type) for field in dataclasses.fields(Sampling)}
  for name, value in settings.items():
    if name not in known:
      raise InputError(f"{name}: no such setting; there are: {', '.join(known)}")
    if isinstance(value, bool) or not isinstance(value, _NUMBERS[known[name]]):
      raise InputError(f"{name}={value!r}: expected {known[name]}")
  return Sampling(**settings)


def as_ids(ids: Any) -> np.ndarray:
  """Returns ids (B, L) as int32; what is no integer stays as it is.

  Raises:
    InputError: rows of different lengths.
  """
  try:
    array = np.asarray(ids)
  except ValueError:
    raise InputError("ids: rows have different lengths; score each by itself") from None
  whole = np.issubdtype(array.dtype, np.integer)
  fits = whole and array.size and np.abs(array).max() <= np.iinfo(np.int32).max
  return array.astype(np.int32) if fits else array
