"""Tensors in files that `torch.save` wrote, read without torch and without running what is in them.

Such a file is a zip: `data.pkl`, a pickle whose tensors name storages, and a file of bytes for each
storage, stored as it is. The pickle is read as inert data (`inert_pickle`); a tensor is a view of a
storage, mapped into memory when asked for. Its size, offset and strides are held against the file.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.inert_pickle import Name, Record, as_pairs, read_pickle
from jaxmoe.core.errors import InputError

_TYPES = {
  "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
  "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
  "Bool": "bool",
}  # fmt: skip
STORAGES = {f"torch.{name}Storage": jnp.dtype(dtype) for name, dtype in _TYPES.items()}
DTYPES = {f"torch.{dtype}": jnp.dtype(dtype) for dtype in _TYPES.values()}
_LOCAL_HEADER, _MAX_DEPTH = 30, 64


@dataclasses.dataclass(frozen=True)
class Storage:
  """The bytes of one file of the zip, as numbers of a dtype."""

  file: TorchFile
  key: str
  dtype: np.dtype
  size: int


@dataclasses.dataclass(frozen=True, eq=False)
class TorchTensor:
  """A tensor as a view of a storage.

  Attributes:
    storage: Where its numbers lie.
    offset: Of its first number.
    shape: Its dims.
    strides: By how many numbers a step in each dim goes on.
  """

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def dtype(self) -> np.dtype:
    """Of its numbers."""
    return self.storage.dtype

  def read(self) -> np.ndarray:
    """Returns a copy of its numbers.

    Raises:
      InputError: The bytes are not those that were written.
    """
    flat = self.storage.file.numbers(self.storage)
    steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
    view = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, steps, writeable=False)
    return np.array(view)

  def part(self, start: int, size: int) -> np.ndarray:
    """Returns a copy of so many numbers of a flat tensor.

    Raises:
      InputError: As `read`.
    """
    assert self.strides == (1,) and 0 <= start <= start + size <= self.shape[0], self
    first = self.offset + start
    return np.array(self.storage.file.numbers(self.storage)[first : first + size])


class TorchFile:
  """A file that `torch.save` wrote.

  Attributes:
    tree: What was saved: dicts, lists, tuples, numbers and text, `TorchTensor` for tensors, and
      `Record` for any other object.
  """

  def __init__(self, path: str | os.PathLike[str], span: tuple[int, int] | None = None):
    """Reads what is in the file but for the tensors' numbers.

    Args:
      path: The file.
      span: First byte and length of the part of it that is meant; None for all.

    Raises:
      InputError: It is none, is cut or damaged, or of a machine of the other byte order.
    """
    self.path = pathlib.Path(path)
    self._first = span[0] if span else 0
    self._whole: set[str] = set()
    try:
      with self._opened(span) as file, zipfile.ZipFile(file) as archive:
        self._entries = {entry.filename: entry for entry in archive.infolist()}
        self._folder = self._folder_of()
        order = self._entries.get(f"{self._folder}byteorder")
        if order is not None and archive.read(order).strip() != b"little":
          raise InputError(f"{self.path}: written on a big-endian machine; save it on another")
        if self._entries[f"{self._folder}data.pkl"].compress_type != zipfile.ZIP_STORED:
          raise KeyError("data.pkl is compressed")
        pickled = archive.read(f"{self._folder}data.pkl")
    except (OSError, zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
      raise InputError(
        f"{self.path}: no whole file of torch.save ({error}); fetch it again, or if torch before "
        "1.6 wrote it, save it anew"
      ) from None
    self.tree = read_pickle(pickled, f"{self.path}, data.pkl", _CALLS, self._storage)

  def _opened(self, span: tuple[int, int] | None) -> IO[bytes]:
    """Returns the file, or the part of it that is meant."""
    if span is None:
      return open(self.path, "rb")
    if not 0 < span[1] <= self.path.stat().st_size - span[0]:
      raise KeyError("it ends before the part that is meant")
    return io.BufferedReader(_Part(self.path, *span))

  def numbers(self, storage: Storage) -> np.ndarray:
    """Returns the numbers of a storage, mapped; the first time its checksum is compared.

    Raises:
      InputError: The bytes are not those that were written.
    """
    entry = self._entries[f"{self._folder}data/{storage.key}"]
    if not storage.size:
      return np.zeros(0, storage.dtype)
    found = np.memmap(self.path, np.uint8, "r", self._start(entry), (entry.file_size,))
    if storage.key not in self._whole:
      if zlib.crc32(found.data) != entry.CRC:
        raise InputError(f"{self.path}: storage {storage.key} is damaged; fetch the file again")
      self._whole.add(storage.key)
    return found.view(storage.dtype)

  def _folder_of(self) -> str:
    """Returns the folder of the zip in which all lies, with a slash."""
    found = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
      raise KeyError("no data.pkl")
    return found[0].removesuffix("data.pkl")

  def _start(self, entry: zipfile.ZipInfo) -> int:
    """Returns where an entry's bytes begin, which its own header says."""
    with open(self.path, "rb") as file:
      file.seek(self._first + entry.header_offset)
      header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
      raise InputError(f"{self.path}: {entry.filename} is damaged; fetch the file again")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return self._first + entry.header_offset + _LOCAL_HEADER + name + extra

  def _storage(self, given: Any) -> Storage:
    """Returns the storage of a persistent id: ('storage', its class, key, device, numbers)."""
    kind, of, key, _, size = given
    dtype = STORAGES.get(str(of)) if isinstance(of, Name) else None
    if kind != "storage" or dtype is None or not isinstance(key, str) or not _is_count(size):
      raise ValueError(f"no storage of known numbers: {of}")
    entry = self._entries.get(f"{self._folder}data/{key}")
    if entry is None or entry.compress_type != zipfile.ZIP_STORED:
      raise ValueError(f"storage {key!r} is not there as it was")
    if entry.file_size != size * dtype.itemsize:
      raise ValueError(f"storage {key} has {entry.file_size} bytes for {size} numbers of {dtype}")
    return Storage(self, key, dtype, size)


class _Part(io.RawIOBase):
  """A part of a file, read as if it were all."""

  def __init__(self, path: pathlib.Path, start: int, length: int):
    self._file, self._start, self._length, self._at = open(path, "rb"), start, length, 0  # noqa: SIM115

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
    self._at = max(0, begin + offset)
    return self._at

  def readinto(self, buffer: Any) -> int:
    self._file.seek(self._start + self._at)
    found = self._file.read(min(len(buffer), max(0, self._length - self._at)))
    buffer[: len(found)] = found
    self._at += len(found)
    return len(found)

  def close(self) -> None:
    self._file.close()
    super().close()


def tensors_of(tree: Any, where: str = "") -> Iterator[tuple[str, TorchTensor]]:
  """Yields the tensors of dicts, lists and tuples by their keys, joined by dots.

  Raises:
    InputError: Something is nested in itself, or in more than 64 others.
  """
  yield from _tensors(tree, where, 0)


def _tensors(tree: Any, where: str, depth: int) -> Iterator[tuple[str, TorchTensor]]:
  if depth > _MAX_DEPTH:
    raise InputError(f"{where}: nested deeper than {_MAX_DEPTH}; no checkpoint is")
  if isinstance(tree, TorchTensor):
    yield where, tree
  pairs: Iterable[tuple[Any, Any]] = tree.items() if isinstance(tree, dict) else ()
  pairs = enumerate(tree) if isinstance(tree, list | tuple) else pairs
  for key, value in pairs:
    yield from _tensors(value, f"{where}.{key}" if where else str(key), depth + 1)


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TorchTensor:
  """Returns what `torch._utils._rebuild_tensor_v2` is called for; gradients and hooks are left."""
  numbers = (offset, *shape, *strides)
  if not isinstance(storage, Storage) or not all(map(_is_count, numbers)):
    raise ValueError("a tensor of no storage")
  if len(shape) != len(strides):
    raise ValueError(f"a tensor of shape {shape} with strides {strides}")
  last = offset + sum((size - 1) * step for size, step in zip(shape, strides))
  count = math.prod(shape)
  # A view may be expanded over one number: what is read is not to be larger than what is there.
  if count and (last >= storage.size or count > storage.size):
    raise ValueError(f"a tensor of shape {shape} beyond its storage of {storage.size} numbers")
  return TorchTensor(storage, offset, tuple(shape), tuple(strides))


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
  """Returns what `collections.OrderedDict` is called for."""
  return as_pairs([part for key, value in pairs for part in (key, value)])


def _parameter(tensor: Any, *_: Any) -> Any:
  """Returns what `torch._utils._rebuild_parameter` is called for: the tensor."""
  if not isinstance(tensor, TorchTensor):
    raise ValueError("a parameter of no tensor")
  return tensor


def _typed(function: Any, of: Any, given: Any, state: Any) -> TorchTensor:
  """Returns what `torch._tensor._rebuild_from_type_v2` is called for: a tensor with attributes."""
  del of, state
  if str(function) != "torch._utils._rebuild_tensor_v2":
    raise ValueError(f"a tensor made by {function}")
  return _tensor(*given)


def _size(dims: Any = ()) -> tuple[Any, ...]:
  """Returns what `torch.Size` is called for."""
  return tuple(dims)


_CALLS: dict[str, Callable[..., Any]] = {
  "collections.OrderedDict": _ordered,
  "torch._utils._rebuild_tensor_v2": _tensor,
  "torch._utils._rebuild_parameter": _parameter,
  "torch._tensor._rebuild_from_type_v2": _typed,
  "torch.Size": _size,
}

__all__ = ["Record", "TorchFile", "TorchTensor", "tensors_of"]
