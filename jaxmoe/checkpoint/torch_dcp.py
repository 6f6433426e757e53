"""Folders of torch.distributed.checkpoint: tensors in chunks by process, read without torch.

`.metadata`, a bare pickle, says of each tensor its shape and chunks, and in which file each chunk
lies, from which byte; there it is a file of torch.save of its own. The pickle is read as inert
data; chunks are held against the shape, so that each number comes from one place.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import pathlib
from typing import Any

import numpy as np

from jaxmoe.checkpoint.inert_pickle import Name, Record, read_pickle
from jaxmoe.checkpoint.torch_file import DTYPES, TorchFile, TorchTensor
from jaxmoe.core.errors import InputError

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint"
Dims = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Chunk:
  """A part of a tensor: where it begins, its shape, and its file with first byte and length."""

  offsets: Dims
  shape: Dims
  file: str
  start: int
  length: int


@dataclasses.dataclass(frozen=True)
class DcpTensor:
  """A tensor in chunks.

  Attributes:
    shape: Of the whole.
    dtype: Of its numbers.
    chunks: Which are all of it, each number once.
  """

  shape: Dims
  dtype: np.dtype
  chunks: tuple[Chunk, ...]


class DcpFolder:
  """A folder that torch.distributed.checkpoint wrote.

  Attributes:
    tensors: By the name that it gave them; of other objects nothing is read.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Reads `.metadata`.

    Raises:
      InputError: It is damaged, or says what cannot be.
    """
    self.path = pathlib.Path(path)
    where = self.path / METADATA
    try:
      data = where.read_bytes()
    except OSError as error:
      raise InputError(f"{where}: cannot be read ({error.strerror}); fetch it again") from None
    tree = read_pickle(data, str(where), {"torch.Size": tuple, "collections.OrderedDict": dict})
    try:
      state = _state(tree, "metadata.Metadata")
      places = dict(map(_place, state["storage_data"].items()))
      found = state["state_dict_metadata"].items()
      self.tensors = {
        str(name): _tensor(str(name), _state(of, "metadata.TensorStorageMetadata"), places)
        for name, of in found if not _is(of, "metadata.BytesStorageMetadata")
      }  # fmt: skip
    except (ValueError, TypeError, LookupError, AttributeError) as error:
      raise InputError(f"{where}: not what torch writes there ({error}); fetch it again") from None

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor, one chunk in memory beside it.

    Raises:
      InputError: A file is missing, damaged, or holds another chunk.
    """
    tensor = self.tensors[name]
    whole = np.empty(tensor.shape, tensor.dtype)
    for chunk in tensor.chunks:
      path = self.path / chunk.file
      part = TorchFile(path, (chunk.start, chunk.length)).tree
      if (
        not isinstance(part, TorchTensor)
        or part.shape != chunk.shape
        or part.dtype != tensor.dtype
      ):
        raise InputError(f"{path}: holds another part of {name} than {METADATA} says; fetch both")
      at = tuple(slice(low, low + size) for low, size in zip(chunk.offsets, chunk.shape))
      whole[at] = part.read()
    return whole


def _is(found: Any, name: str) -> bool:
  return isinstance(found, Record) and str(found.of) == f"{_MODULE}.{name}"


def _state(found: Any, name: str) -> dict[str, Any]:
  """Returns the attributes of a record of this class."""
  if not _is(found, name) or not isinstance(found.state, dict):
    raise ValueError(f"no {name.rpartition('.')[2]}")
  return found.state


def _place(item: tuple[Any, Any]) -> tuple[tuple[str, Dims], tuple[str, int, int]]:
  """Returns name and offset of a chunk, and its file with first byte and length."""
  index, info = _state(item[0], "metadata.MetadataIndex"), item[1]
  place = _state(info, "filesystem._StorageInfo")
  file, start, length = place["relative_path"], place["offset"], place["length"]
  if not isinstance(file, str) or pathlib.PurePath(file).name != file:
    raise ValueError(f"a chunk in {file!r}, which is no file beside it")
  if not all(isinstance(one, int) and one >= 0 for one in (start, length)):
    raise ValueError("a chunk that begins before its file")
  if place.get("transform_descriptors"):
    raise ValueError("chunks that are compressed; save them as they are")
  return (str(index["fqn"]), _dims(index.get("offset", ()))), (file, start, length)


def _dims(value: Any) -> Dims:
  if not isinstance(value, tuple) or not all(isinstance(one, int) and one >= 0 for one in value):
    raise ValueError(f"dims {value}")
  return value


def _tensor(
  name: str, of: dict[str, Any], places: dict[tuple[str, Dims], tuple[str, int, int]]
) -> DcpTensor:
  """Returns a tensor whose chunks are all of it, each number once."""
  shape, properties = _dims(of["size"]), of["properties"]
  if not _is(properties, "metadata.TensorProperties"):
    raise ValueError(f"{name} without properties")
  said = properties.state
  dtype = said[0] if isinstance(said, tuple) else said["dtype"]
  if not isinstance(dtype, Name) or str(dtype) not in DTYPES:
    raise ValueError(f"{name} of an unknown dtype {dtype}")
  chunks = []
  for record in of["chunks"]:
    state = _state(record, "metadata.ChunkStorageMetadata")
    offsets, size = _dims(state["offsets"]), _dims(state["sizes"])
    chunks.append(Chunk(offsets, size, *places[name, offsets]))
  _check_chunks(name, shape, chunks)
  return DcpTensor(shape, DTYPES[str(dtype)], tuple(chunks))


def _check_chunks(name: str, shape: Dims, chunks: list[Chunk]) -> None:
  for chunk in chunks:
    if not len(chunk.offsets) == len(chunk.shape) == len(shape) or any(
      low + size > whole for low, size, whole in zip(chunk.offsets, chunk.shape, shape)
    ):
      raise ValueError(f"a chunk of {name} beyond its shape {shape}")
  for one, other in itertools.combinations(chunks, 2):
    if all(
      low < there + more and there < low + size
      for low, size, there, more in zip(one.offsets, one.shape, other.offsets, other.shape)
    ):
      raise ValueError(f"chunks of {name} that overlap")
  if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
    raise ValueError(f"chunks of {name} that are not all of it")
