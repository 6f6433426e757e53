"""The safetensors files of a checkpoint: one, or shards with an index. Nothing else is opened."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from jaxmoe.core.errors import InputError
from jaxmoe.models.pretrained.tensor_mapping import Shape, some

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ".bin", ".pt", ".pth", ".ckpt"
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}


class CheckpointFiles:
  """Tensors by name, read when asked for; files are mapped, not loaded.

  Attributes:
    shapes: Of each tensor.
    dtypes: Of each tensor.
    num_bytes: Of all tensors.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Reads the headers of all files.

    Raises:
      InputError: there are none, they do not fit the index, are damaged, or of a dtype that is not
        handled.
    """
    self.path = pathlib.Path(path)
    self._files: dict[str, Any] = {}
    self.shapes: dict[str, Shape] = {}
    self.dtypes: dict[str, np.dtype] = {}
    for file, expected in _listed(self.path).items():
      self._open(file, expected)
    self.num_bytes = sum(
      int(np.prod(shape)) * self.dtypes[name].itemsize for name, shape in self.shapes.items()
    )

  def read(self, name: str) -> np.ndarray:
    """Returns a copy of a tensor."""
    return self._files[name].get_tensor(name)

  def close(self) -> None:
    """Closes the files."""
    self._files.clear()

  def _open(self, path: pathlib.Path, expected: set[str] | None) -> None:
    """Takes the tensors of a file; `expected` are those the index says it has."""
    try:
      file = safetensors.safe_open(path, framework="numpy")
      names = set(file.keys())
    except (OSError, safetensors.SafetensorError) as error:
      raise InputError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
    if expected is not None and names != expected:
      raise InputError(
        f"{path}: holds other tensors than {INDEX} says: {some(sorted(names ^ expected))}; fetch "
        "the checkpoint again"
      )
    for name in names:
      if name in self._files:
        raise InputError(f"{path}: {name} is in another file, too; keep one")
      part = file.get_slice(name)
      if part.get_dtype() not in DTYPES:
        raise InputError(
          f"{path}: {name} is {part.get_dtype()}, only {', '.join(DTYPES)} are handled; save the "
          "checkpoint in one of them"
        )
      self._files[name] = file
      self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), DTYPES[part.get_dtype()]


def _listed(folder: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
  """Returns the files of a checkpoint, and which tensors the index says each has."""
  if (folder / INDEX).exists():
    return _indexed(folder)
  if (folder / WHOLE).exists():
    return {folder / WHOLE: None}
  files = sorted(folder.glob("*.safetensors"))
  if not files:
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    why = f"there is {pickled[0]}, a pickle, which is never opened" if pickled else "there is none"
    raise InputError(f"{folder}: needs *.safetensors ({why}); save the checkpoint as safetensors")
  if len(files) > 1:
    raise InputError(f"{folder}: several *.safetensors and no {INDEX}; fetch the index, too")
  return dict.fromkeys(files)


def _indexed(folder: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
  """Returns what the index says."""
  path = folder / INDEX
  try:
    weight_map = json.loads(path.read_text(encoding="utf-8-sig"))["weight_map"]
    pairs = sorted(weight_map.items())
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f"{path}: not an index of shards ({error}); fetch it again") from None
  files: dict[pathlib.Path, Any] = {}
  for name, file in pairs:
    if not isinstance(file, str) or pathlib.Path(file).name != file:
      raise InputError(f"{path}: {name} lies in {file!r}, which is no file beside it; not opened")
    files.setdefault(folder / file, set()).add(name)
  return files
