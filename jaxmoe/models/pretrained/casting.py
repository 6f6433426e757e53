"""Casting what a run holds to the dtype of a tensor, and counting what that changes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.models.pretrained.tensor_mapping import TensorSlice

_AT_A_TIME = 2**24


class Caster:
  """Casts pieces of tensors.

  Attributes:
    changed: How many values are not what they were, by the dtype they were cast to.
  """

  def __init__(self) -> None:
    self.changed: collections.Counter[str] = collections.Counter()

  def cast(self, piece: TensorSlice, dtype: np.dtype) -> Iterator[TensorSlice]:
    """Yields a piece in a dtype, in parts that need little memory.

    Raises:
      InputError: a number is too large for it.
    """
    if piece.values.dtype == dtype:
      yield piece
      return
    rows = max(1, _AT_A_TIME * len(piece.values) // max(piece.values.size, 1))
    for start in range(0, len(piece.values), rows):
      values = piece.values[start : start + rows]
      first = piece.place[0].start + start
      place = (slice(first, first + len(values)), *piece.place[1:])
      yield dataclasses.replace(piece, place=place, values=self._cast(piece.name, values, dtype))

  def _cast(self, name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
      cast = values.astype(dtype)
    if (np.isfinite(values) & ~np.isfinite(cast)).any():
      raise InputError(
        f"{name} has numbers that {dtype} cannot hold; write it with --file_dtype=float32"
      )
    same = (cast.astype(values.dtype) == values) | np.isnan(values)
    self.changed[dtype.name] += int(values.size - np.count_nonzero(same))
    return cast
