"""Folders as torch.distributed.checkpoint writes them, without torch; and wrong ones."""

import contextlib
import dataclasses
import io
import pickle
import sys
import types

import numpy as np

from tests.checkpoint.torch_zip import Stored, View, save

PACKAGE = "torch.distributed.checkpoint"
CLASSES = {
  "metadata": ("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties",
               "ChunkStorageMetadata", "BytesStorageMetadata"),
  "filesystem": ("_StorageInfo",),
}  # fmt: skip


class Dtype:
  """A dtype of torch, which is pickled by its name."""

  def __init__(self, name):
    self.name, self.__module__ = name, "torch"

  def __reduce__(self):
    return self.name

  def __repr__(self):
    return self.name


FLOAT, COMPLEX = Dtype("float32"), Dtype("complex64")


@dataclasses.dataclass
class Entry:
  """A tensor: its chunks by offset, and what is said of it or stored of it that is not so."""

  array: np.ndarray
  chunks: dict
  said: dict | None = None
  stored: dict | None = None
  shape: tuple | None = None
  dtype: Dtype = FLOAT


@contextlib.contextmanager
def classes_there():
  """Puts classes with torch's names where pickle looks for them; yields what makes objects."""
  modules = {}
  for module, names in CLASSES.items():
    made = types.ModuleType(f"{PACKAGE}.{module}")
    for name in names:
      setattr(made, name, type(name, (), {"__module__": made.__name__, "__qualname__": name}))
    modules[made.__name__] = made
  torch = types.ModuleType("torch")
  torch.float32, torch.complex64 = FLOAT, COMPLEX
  modules |= {name: types.ModuleType(name) for name in ("torch.distributed", PACKAGE)}
  modules["torch"] = torch
  before = {name: sys.modules.get(name) for name in modules}
  sys.modules.update(modules)

  def new(name, **state):
    of = next(vars(module)[name] for module in modules.values() if name in vars(module))
    found = of()
    found.__dict__.update(state)
    return found

  try:
    yield new
  finally:
    for name, module in before.items():
      sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def save_folder(folder, entries, file="__0_0.distcp", info=None):
  """Writes tensors, all into one file, which is said to be called `file`."""
  data, places = b"", {}
  for name, entry in entries.items():
    for offsets, size in (entry.stored or entry.chunks).items():
      at = tuple(slice(low, low + more) for low, more in zip(offsets, size))
      save(folder / "part", View(Stored(entry.array[at], "0")))
      part = (folder / "part").read_bytes()
      places[name, offsets] = (len(data), len(part))
      data += part
  (folder / "part").unlink()
  (folder / "__0_0.distcp").write_bytes(data)
  stream = io.BytesIO()
  with classes_there() as new:
    storage = {
      new("MetadataIndex", fqn=name, offset=offsets):
      new("_StorageInfo", relative_path=file, offset=start, length=length, **(info or {}))
      for (name, offsets), (start, length) in places.items()
    }  # fmt: skip
    tensors = {name: _said(new, entry) for name, entry in entries.items()}
    tensors["step"] = new("BytesStorageMetadata")
    pickle.dump(new("Metadata", state_dict_metadata=tensors, storage_data=storage), stream)
  (folder / ".metadata").write_bytes(stream.getvalue())


def _said(new, entry):
  chunks = (entry.said or entry.chunks).items()
  return new(
    "TensorStorageMetadata", properties=new("TensorProperties", dtype=entry.dtype),
    size=entry.array.shape if entry.shape is None else entry.shape,
    chunks=[new("ChunkStorageMetadata", offsets=low, sizes=size) for low, size in chunks],
  )  # fmt: skip
