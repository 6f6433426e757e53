"""Writing safetensors files in shards with an index, one tensor in memory at a time.

A shard is first laid out in a file beside it, mapped into memory, from which the safetensors
library writes it: what is kept is pages of a file, which the system may write back and drop. The
same tensors give the same bytes. The library makes files for the owner alone: they get the mode
that any other new file has.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import safetensors.numpy

from jaxmoe.core.errors import InputError
from jaxmoe.models.pretrained.checkpoint_files import INDEX, WHOLE
from jaxmoe.models.pretrained.tensor_mapping import Shape, TensorSlice

_ALIGN = 64


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """Name, shape and dtype of a tensor that is to be written."""

  name: str
  shape: Shape
  dtype: np.dtype

  @property
  def num_bytes(self) -> int:
    """Of its values."""
    return int(np.prod(self.shape)) * self.dtype.itemsize


def plan_shards(tensors: Sequence[TensorSpec], limit_bytes: int) -> dict[str, list[TensorSpec]]:
  """Returns the tensors of each file, in order, each file below the limit or of one tensor."""
  shards: list[list[TensorSpec]] = [[]]
  for tensor in tensors:
    filled = sum(other.num_bytes for other in shards[-1])
    if shards[-1] and filled + tensor.num_bytes > limit_bytes:
      shards.append([])
    shards[-1].append(tensor)
  if len(shards) == 1:
    return {WHOLE: shards[0]}
  count = len(shards)
  return {f"model-{at:05}-of-{count:05}.safetensors": of for at, of in enumerate(shards, start=1)}


def write_shards(
  folder: pathlib.Path,
  shards: Mapping[str, list[TensorSpec]],
  pieces: Iterator[TensorSlice],
  alive: Callable[[int], None],
) -> None:
  """Writes the files of a plan, and their index where there are several.

  Args:
    folder: Where they go.
    shards: The plan.
    pieces: All of every tensor, in about the order of the plan, in any float dtype.
    alive: Called with the bytes of each piece when it is laid out.

  Raises:
    InputError: the disk refuses it.
  """
  file_of = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
  views: dict[str, dict[str, np.ndarray]] = {}
  modes: dict[str, int] = {}
  left = {file: sum(tensor.num_bytes for tensor in tensors) for file, tensors in shards.items()}
  try:
    for piece in pieces:
      file = file_of[piece.name]
      if file not in views:
        views[file], modes[file] = _laid_out(folder / f".{file}", shards[file])
      target = views[file][piece.name].reshape(piece.apart)[piece.place]
      target[...] = piece.values
      left[file] -= target.nbytes
      alive(target.nbytes)
      if not left[file]:
        whole = views.pop(file)
        safetensors.numpy.save_file(whole, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(modes[file])
    assert not any(left.values()), left
    if len(shards) > 1:
      _write_index(folder / INDEX, shards)
  except (OSError, safetensors.SafetensorError) as error:
    raise InputError(f"{folder}: cannot be written ({error}); choose another folder") from None


def _laid_out(path: pathlib.Path, tensors: list[TensorSpec]) -> tuple[dict[str, np.ndarray], int]:
  """Returns an array for each tensor, in a file that has no name any more, and its mode."""
  starts, end = [], 0
  for tensor in tensors:
    starts.append(end)
    end += -(-tensor.num_bytes // _ALIGN) * _ALIGN
  with open(path, "w+b") as file:
    path.unlink()
    os.posix_fallocate(file.fileno(), 0, end)  # a full disk is an error here, not a signal later
    memory = np.memmap(file, np.uint8, "r+", shape=(end,))
    mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
  views = {
    tensor.name: memory[start : start + tensor.num_bytes].view(tensor.dtype).reshape(tensor.shape)
    for start, tensor in zip(starts, tensors)
  }
  return views, mode


def _write_index(path: pathlib.Path, shards: Mapping[str, list[TensorSpec]]) -> None:
  total = sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors)
  files = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
  index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
  path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
