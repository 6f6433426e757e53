"""The files of a checkpoint with tensors by name: one, or shards with an index.

They are safetensors, or where there are none what torch.save, torch.distributed.checkpoint or
DeepSpeed wrote, of which nothing is run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
import safetensors

from jaxmoe.checkpoint.deepspeed_universal import WEIGHTS, UniversalFolder, universal_folder
from jaxmoe.checkpoint.deepspeed_zero import (
  MOMENTS,
  OPTIMIZER_FILES,
  TrainedFolder,
  ZeroFolder,
  zero_folder,
)
from jaxmoe.checkpoint.torch_dcp import METADATA, DcpFolder
from jaxmoe.checkpoint.torch_file import TorchFile, TorchTensor
from jaxmoe.core.errors import InputError
from jaxmoe.models.pretrained.tensor_mapping import Shape, some

WHOLE, TORCH_WHOLE = "model.safetensors", "pytorch_model.bin"
INDEX = f"{WHOLE}.index.json"
_TABLE = "model.embed_tokens.weight"
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Moments:
  """What Adam kept of a model.

  Attributes:
    count: Its updates.
    skipped: Steps beside them that changed nothing.
    settings: What it was set to, for each group of parameters; none where that is not said.
    read: Returns `exp_avg` or `exp_avg_sq`, of the tensor of a name.
  """

  count: int
  skipped: int
  settings: tuple[Mapping[str, Any], ...]
  read: Callable[[str, str], np.ndarray]


class TensorFile(Protocol):
  """One file of a checkpoint; its tensors are read when asked for."""

  def tensors(self) -> Mapping[str, tuple[Shape, np.dtype | str]]:
    """Returns shape and dtype of each tensor by name; of a dtype not handled what it is called."""

  def read(self, name: str) -> np.ndarray:
    """Returns a copy of a tensor."""


class Safetensors:
  """A safetensors file, mapped."""

  def __init__(self, path: pathlib.Path):
    """Reads the header; raises OSError or SafetensorError of a file that is none."""
    self._file = safetensors.safe_open(path, framework="numpy")

  def tensors(self) -> dict[str, tuple[Shape, np.dtype | str]]:
    """Returns shape and dtype of each tensor."""
    parts = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
    return {
      name: (tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
      for name, part in parts.items()
    }

  def read(self, name: str) -> np.ndarray:
    """Returns a copy of a tensor."""
    return self._file.get_tensor(name)


class TorchTensors:
  """A file that torch.save wrote of a dict of tensors; nothing in it is run."""

  def __init__(self, path: pathlib.Path):
    """Reads what is in it but for numbers.

    Raises:
      InputError: it is none, is damaged, or holds something else.
    """
    tree = TorchFile(path).tree
    if not isinstance(tree, dict) or not all(isinstance(of, TorchTensor) for of in tree.values()):
      raise InputError(f"{path}: holds something else than tensors by name; save a state_dict")
    self._tree: dict[str, TorchTensor] = {str(name): of for name, of in tree.items()}

  def tensors(self) -> dict[str, tuple[Shape, np.dtype | str]]:
    """Returns shape and dtype of each tensor."""
    known = set(DTYPES.values())
    return {
      name: (of.shape, of.dtype if of.dtype in known else of.dtype.name)
      for name, of in self._tree.items()
    }

  def read(self, name: str) -> np.ndarray:
    """Returns a copy of a tensor."""
    return self._tree[name].read()


class DcpTensors:
  """A folder of torch.distributed.checkpoint; the model's tensors alone, by their own names."""

  def __init__(self, path: pathlib.Path):
    """Reads what is in it but for numbers.

    Args:
      path: Its `.metadata`.

    Raises:
      InputError: it is damaged, or no tensor is a table of ids.
    """
    self._folder = DcpFolder(path.parent)
    self._names = _names_of_model(self._folder.tensors, path)

  def moments(self) -> Moments | None:
    """Returns Adam's moments by parameter name, as torch flattens `{"optimizer": {"state": ...}}`.

    Raises:
      InputError: they are of different numbers of updates, or the number is not there.
    """
    there, last = self._folder.tensors, f"{_TABLE}.{MOMENTS[1]}"
    before = [name.removesuffix(last) for name in there if name.endswith(f".{last}")]
    if len(before) != 1:
      return None

    def read(moment: str, name: str) -> np.ndarray:
      called = f"{before[0]}{name}.{moment}"
      if called not in there:
        raise InputError(f"{self._folder.path}: no {called}; give --weights_only")
      return self._folder.read(called)

    steps = [name for name in there if name.startswith(before[0]) and name.endswith(".step")]
    counts = {float(self._folder.read(name)) for name in steps if not there[name].shape}
    if len(counts) != 1 or not all(one.is_integer() and one >= 0 for one in counts):
      raise InputError(
        f"{self._folder.path}: {before[0]}*.step, the number of updates, is not one for all "
        f"parameters ({some(sorted(map(str, counts))) or 'none'}); give --weights_only"
      )
    return Moments(int(counts.pop()), 0, (), read)

  def tensors(self) -> dict[str, tuple[Shape, np.dtype | str]]:
    """Returns shape and dtype of each tensor."""
    known, found = set(DTYPES.values()), self._folder.tensors
    return {
      name: (found[there].shape, dtype if (dtype := found[there].dtype) in known else dtype.name)
      for name, there in self._names.items()
    }

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor, put together."""
    return self._folder.read(self._names[name])


class ZeroTensors:
  """A folder of DeepSpeed's ZeRO, or a universal one: float32 weights, put together."""

  def __init__(self, path: pathlib.Path):
    """Reads what is in it but for numbers.

    Args:
      path: One of its files.

    Raises:
      InputError: a file is missing or damaged, or no tensor is a table of ids.
    """
    self._folder: TrainedFolder
    if path.match(WEIGHTS):
      self._folder = UniversalFolder(path.parents[2])
    else:
      self._folder = ZeroFolder(path.parent)
    self._names = _names_of_model(self._folder.tensors, self._folder.path)

  def moments(self) -> Moments | None:
    """Returns Adam's moments; None where it kept none."""
    folder = self._folder

    def read(moment: str, name: str) -> np.ndarray:
      there = self._names[name]
      if there not in folder.moments[moment]:
        raise InputError(f"{folder.path}: no {moment} of {there}; give --weights_only")
      return folder.read(there, moment)

    if not folder.moments:
      return None
    return Moments(folder.count, folder.skipped, tuple(folder.settings), read)

  def tensors(self) -> dict[str, tuple[Shape, np.dtype | str]]:
    """Returns shape and dtype of each tensor."""
    found = self._folder.tensors
    return {name: (found[there].shape, DTYPES["F32"]) for name, there in self._names.items()}

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor, put together."""
    return self._folder.read(self._names[name])


def _names_of_model(there: Collection[str], where: pathlib.Path) -> dict[str, str]:
  """Returns, by the names that transformers gives them, the names of a model's tensors.

  Raises:
    InputError: where the model lies is not known.
  """
  found = [name.removesuffix(_TABLE) for name in there if name.endswith(_TABLE)]
  if len(found) != 1:
    raise InputError(
      f"{where}: no tensor, or several, end in {_TABLE}, so where the model lies is not known; "
      f"there are {some(sorted(there))}; save the model's state_dict under one key"
    )
  return {name.removeprefix(found[0]): name for name in there if name.startswith(found[0])}


class CheckpointFiles:
  """Tensors by name, read when asked for; files are mapped, not loaded.

  Attributes:
    shapes: Of each tensor.
    dtypes: Of each tensor.
    num_bytes: Of all tensors.
  """

  def __init__(self, path: str | os.PathLike[str], whole: TensorFile | None = None):
    """Reads the headers of all files.

    Args:
      path: The folder.
      whole: What holds all tensors; None for what lies in the folder.

    Raises:
      InputError: there are none, they do not fit the index, are damaged, or of a dtype that is not
        handled.
    """
    self.path = pathlib.Path(path)
    self._files: dict[str, TensorFile] = {}
    self.shapes: dict[str, Shape] = {}
    self.dtypes: dict[str, np.dtype] = {}
    if whole is not None:
      self._take(self.path, whole)
    else:
      index, files = _listed(self.path)
      for file, expected in files.items():
        self._open(file, expected, index)
    self.num_bytes = sum(
      int(np.prod(shape)) * self.dtypes[name].itemsize for name, shape in self.shapes.items()
    )

  def read(self, name: str) -> np.ndarray:
    """Returns a copy of a tensor."""
    return self._files[name].read(name)

  def moments(self) -> Moments | None:
    """Returns what Adam kept; None where the files hold no such thing.

    Raises:
      InputError: it is not whole.
    """
    files = [of for of in self._files.values() if isinstance(of, DcpTensors | ZeroTensors)]
    return files[0].moments() if files else None

  def close(self) -> None:
    """Closes the files."""
    self._files.clear()

  def _open(self, path: pathlib.Path, expected: set[str] | None, index: str) -> None:
    """Takes the tensors of a file; `expected` are those the index says it has."""
    try:
      file = _KINDS.get(path.suffix or path.name, Safetensors)(path)
    except (OSError, safetensors.SafetensorError) as error:
      raise InputError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
    found = file.tensors()
    if expected is not None and found.keys() != expected:
      raise InputError(
        f"{path}: holds other tensors than {index} says: {some(sorted(found.keys() ^ expected))}; "
        "fetch the checkpoint again"
      )
    self._take(path, file)

  def _take(self, path: pathlib.Path, file: TensorFile) -> None:
    """Takes the tensors of a file."""
    for name, (shape, dtype) in file.tensors().items():
      if name in self._files:
        raise InputError(f"{path}: {name} is in another file, too; keep one")
      if isinstance(dtype, str):
        raise InputError(
          f"{path}: {name} is {dtype}, only {', '.join(DTYPES)} are handled; save the checkpoint "
          "in one of them"
        )
      self._files[name], self.shapes[name], self.dtypes[name] = file, shape, dtype


_KINDS: dict[str, Callable[[pathlib.Path], TensorFile]] = {
  ".bin": TorchTensors, ".pt": ZeroTensors, METADATA: DcpTensors
}  # fmt: skip
"""By suffix, or by name of a file without one; others are safetensors."""


def _listed(folder: pathlib.Path) -> tuple[str, dict[pathlib.Path, set[str] | None]]:
  """Returns the index, files of a checkpoint, and which tensors the index says each has."""
  for whole in (WHOLE, TORCH_WHOLE):
    index = f"{whole}.index.json"
    if (folder / index).exists():
      return index, _indexed(folder / index)
    if (folder / whole).exists():
      return "", {folder / whole: None}
    others = sorted(folder.glob("*.safetensors"))
    if len(others) > 1:
      raise InputError(f"{folder}: several *.safetensors and no {index}; fetch the index, too")
    if others:
      return "", dict.fromkeys(others)
  shards = sorted(zero_folder(folder).glob(OPTIMIZER_FILES))
  atoms = sorted(universal_folder(folder).glob(WEIGHTS))
  metadata = [folder / METADATA] if (folder / METADATA).exists() else []
  kinds = [files[0] for files in (metadata, shards, atoms) if files]
  if len(kinds) > 1:
    raise InputError(
      f"{folder}: checkpoints of two kinds, {kinds[0].name} and {kinds[1].name}; keep one"
    )
  if kinds:
    return "", {kinds[0]: None}
  raise InputError(
    f"{folder}: needs *.safetensors, {TORCH_WHOLE}, {METADATA} of torch.distributed.checkpoint or "
    f"DeepSpeed's {OPTIMIZER_FILES} (there is none); save the checkpoint as safetensors"
  )


def _indexed(path: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
  """Returns what an index says."""
  try:
    weight_map = json.loads(path.read_text(encoding="utf-8-sig"))["weight_map"]
    pairs = sorted(weight_map.items())
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f"{path}: not an index of shards ({error}); fetch it again") from None
  files: dict[pathlib.Path, Any] = {}
  for name, file in pairs:
    if not isinstance(file, str) or pathlib.Path(file).name != file:
      raise InputError(f"{path}: {name} lies in {file!r}, which is no file beside it; not opened")
    files.setdefault(path.parent / file, set()).add(name)
  return files
