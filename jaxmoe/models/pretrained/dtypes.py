"""The dtype of each tensor of a checkpoint, kept beside the run that is made of it.

In a run a weight may be of a wider one, and training makes it so: float16 is read into float32,
what trains has float32 masters, buffers are float32. What is made of the run has these dtypes
again. What surgery added has that of the rest of its weight, or what most weights have.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.models.pretrained.checkpoint import Checkpoint
from jaxmoe.models.pretrained.checkpoint_files import DTYPES
from jaxmoe.models.pretrained.tensor_mapping import BoundParam

NAMES = {dtype.name for dtype in DTYPES.values()}


@dataclasses.dataclass(frozen=True)
class Dtypes:
  """The dtypes that tensors are written in.

  Attributes:
    weights: By canonical name of a weight: of all its tensors, or by their names where they differ.
    asked: That which all but buffers were asked to have in place of their own; None for none.
  """

  weights: Mapping[str, str | Mapping[str, str]]
  asked: str | None = None

  def of(self, bound: BoundParam, tensor: str) -> np.dtype:
    """Returns the dtype of a tensor of a weight."""
    found = self.weights.get(bound.name)
    if found is None:
      return bound.dtype if is_buffer(bound) else np.dtype(self._most())
    if not isinstance(found, str):
      found = found.get(tensor) or _widest(map(np.dtype, found.values())).name
    return np.dtype(found)

  def write(self, path: pathlib.Path) -> None:
    """Writes them as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

  def _most(self) -> str:
    """Returns what most weights have."""
    flat = [
      dtype
      for found in self.weights.values()
      for dtype in ([found] if isinstance(found, str) else found.values())
    ]
    return collections.Counter(flat).most_common(1)[0][0]


def is_buffer(bound: BoundParam) -> bool:
  """Whether a weight is moved by rules, not trained; it keeps its dtype whatever is asked."""
  return "/buffers/" in bound.name


def dtypes_of(checkpoint: Checkpoint, asked: str | None = None) -> Dtypes:
  """Returns the dtypes of a checkpoint's tensors by the names that are written.

  Args:
    checkpoint: It.
    asked: What all but buffers are to be in its place.
  """
  weights: dict[str, str | dict[str, str]] = {}
  for bound, layout in checkpoint.weights:
    if layout is None:
      continue
    there = {name: checkpoint.files.dtypes[name] for name, _ in bound.tensors(layout)}
    if asked and not is_buffer(bound):
      weights[bound.name] = asked
    elif layout == bound.layout and len(set(there.values())) > 1:
      weights[bound.name] = {name: dtype.name for name, dtype in there.items()}
    else:
      weights[bound.name] = _widest(there.values()).name
  return Dtypes(weights, asked)


def read_dtypes(path: pathlib.Path) -> Dtypes | None:
  """Returns what `Dtypes.write` wrote, None where there is no file: of runs of before.

  Raises:
    InputError: the file is damaged.
  """
  try:
    found = Dtypes(**json.loads(path.read_text(encoding="utf-8")))
    names = {
      dtype
      for of in found.weights.values()
      for dtype in ([of] if isinstance(of, str) else of.values())
    }
    if not names or not names | {found.asked} <= NAMES | {None}:
      raise ValueError(f"dtypes must be some of {', '.join(sorted(NAMES))}")
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise InputError(f"{path}: cannot be read ({error}); restore the file") from None
  return found


def _widest(dtypes: Iterable[np.dtype]) -> np.dtype:
  """Returns the narrowest dtype that holds the values of all."""
  first, *rest = dtypes
  for dtype in rest:
    first = np.dtype(jnp.promote_types(first, dtype))
  return first
