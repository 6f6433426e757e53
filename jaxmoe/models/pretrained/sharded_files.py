"""A checkpoint of which each file is what one device wrote, put together by rules of a file.

The file of rules is JSON, such as

    {"axes": {"tensor": 2},
     "rules": {"tensor": [{"pattern": ".*norm.weight", "kind": "replicate"},
                          {"pattern": ".*o_proj.weight", "kind": "fragment", "dim": 1}]}}

Files of devices are *.safetensors, or where there are none *.bin, *.pth or *.pt of torch.save, in
order of their names; the last axis changes fastest.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors

from jaxmoe.checkpoint.universal import Rule, Union
from jaxmoe.core.errors import InputError
from jaxmoe.models.pretrained.checkpoint_files import Safetensors, TensorFile, TorchTensors
from jaxmoe.models.pretrained.tensor_mapping import Shape

_KINDS: tuple[tuple[tuple[str, ...], Callable[[pathlib.Path], TensorFile]], ...] = (
  (("*.safetensors",), Safetensors), (("*.bin", "*.pth", "*.pt"), TorchTensors)
)  # fmt: skip
_FIELDS = {field.name for field in dataclasses.fields(Rule)}


class _Shard:
  """The file of one device."""

  def __init__(self, file: TensorFile):
    self._file = file

  def shapes(self) -> dict[str, Shape]:
    """Returns the shape of each tensor by name."""
    return {name: shape for name, (shape, _) in self._file.tensors().items()}

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor."""
    return self._file.read(name)


class ShardedTensors:
  """Tensors of all files of a folder, put together.

  Args:
    folder: With a file for each device.
    rules: The file of rules.

  Raises:
    InputError: the rules cannot be read, do not fit the files, or a file is damaged.
  """

  def __init__(self, folder: pathlib.Path, rules: pathlib.Path):
    axes, of_axes = read_rules(rules)
    files = _files(folder)
    try:
      self._union = Union(axes, of_axes, [_Shard(file) for file in files])
    except InputError as error:
      raise InputError(f"{rules}: {error}") from None
    self._dtypes: dict[str, np.dtype | str] = {}
    for file in files:
      for name, (_, dtype) in file.tensors().items():
        if self._dtypes.setdefault(name, dtype) != dtype:
          raise InputError(f"{folder}: {name} is {self._dtypes[name]} and {dtype}; save it in one")

  def tensors(self) -> dict[str, tuple[Shape, np.dtype | str]]:
    """Returns shape and dtype of each tensor."""
    return {name: (shape, self._dtypes[name]) for name, shape in self._union.shapes.items()}

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor, put together.

    Raises:
      InputError: copies of it differ, or a file is damaged.
    """
    return self._union.read(name)


def read_rules(path: pathlib.Path) -> tuple[dict[str, int], dict[str, list[Rule]]]:
  """Returns sizes and rules of the axes of a file.

  Raises:
    InputError: it holds something else.
  """
  try:
    plain = json.loads(path.read_text(encoding="utf-8-sig"))
    axes = {str(axis): _size(size) for axis, size in plain["axes"].items()}
    rules = {str(axis): [_rule(one) for one in of] for axis, of in plain["rules"].items()}
  except InputError as error:
    raise InputError(f"{path}: {error}") from None
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f"{path}: no axes and rules ({error}); see docs/public_models.md") from None
  return axes, rules


def _size(value: Any) -> int:
  if not isinstance(value, int) or value < 1:
    raise ValueError(f"an axis of {value}")
  return value


def _rule(plain: dict[str, Any]) -> Rule:
  """Returns a rule of its fields."""
  if unknown := plain.keys() - _FIELDS:
    raise ValueError(f"a rule with {', '.join(sorted(unknown))}")
  numbers = [plain.get("dim", 0), plain.get("pad") or 0, *plain.get("sub_widths", ())]
  if not isinstance(plain["pattern"], str) or not all(type(one) is int for one in numbers):
    raise ValueError(f"a rule {plain}")
  return Rule(**{**plain, "sub_widths": tuple(plain.get("sub_widths", ()))})


def _files(folder: pathlib.Path) -> list[TensorFile]:
  """Returns the files of devices in order."""
  for patterns, kind in _KINDS:
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if paths:
      try:
        return [kind(path) for path in paths]
      except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder}: a file is not whole ({error}); fetch it again") from None
  raise InputError(f"{folder}: no *.safetensors, *.bin, *.pth or *.pt of devices; give another")
