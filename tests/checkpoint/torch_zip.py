"""Files as `torch.save` writes them, from NumPy arrays and without torch; and wrong ones."""

import contextlib
import io
import pickle
import sys
import types
import zipfile

import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.torch_file import STORAGES

CLASSES = {dtype.name: name.removeprefix("torch.") for name, dtype in STORAGES.items()}


class Stored:
  """A storage: its class in torch, its key, and how many numbers it is said to have."""

  def __init__(self, array, key, size=None, kind=None):
    self.array, self.key = np.asarray(array, order="C"), key
    self.size = self.array.size if size is None else size
    self.kind = kind or CLASSES[jnp.dtype(array.dtype).name]


class View:
  """A tensor over a storage."""

  def __init__(self, storage, shape=None, strides=None, offset=0):
    self.storage, self.offset = storage, offset
    self.shape = storage.array.shape if shape is None else shape
    whole = np.cumprod([1, *self.shape[:0:-1]])[::-1] if self.shape else ()
    self.strides = tuple(map(int, whole)) if strides is None else strides

  def __reduce__(self):
    from torch import _utils  # the stand-in, see `torch_there`

    given = (self.storage, self.offset, self.shape, self.strides, False, {})
    return _utils._rebuild_tensor_v2, given


@contextlib.contextmanager
def torch_there():
  """Puts modules with torch's names where pickle looks names up."""
  torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
  torch._utils = utils

  def named(name, module):
    made = types.FunctionType((lambda *_: None).__code__, {}, name)
    made.__module__, made.__qualname__ = module.__name__, name
    setattr(module, name, made)

  named("_rebuild_tensor_v2", utils)
  named("_rebuild_parameter", utils)
  for name in (*CLASSES.values(), "OddStorage", "Size"):
    named(name, torch)
  before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
  sys.modules.update({"torch": torch, "torch._utils": utils})
  try:
    yield torch
  finally:
    for name, module in before.items():
      sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def pickled(tree, protocol=2):
  """Returns the stream of a tree with `View`s, and its storages by key."""
  storages = {}
  with torch_there() as torch:

    class Pickler(pickle.Pickler):
      def persistent_id(self, found):
        if not isinstance(found, Stored):
          return None
        storages[found.key] = found
        return "storage", getattr(torch, found.kind), found.key, "cpu", found.size

    stream = io.BytesIO()
    Pickler(stream, protocol).dump(tree)
  return stream.getvalue(), storages


def save(path, tree, order=b"little", without=(), data=None, compression=zipfile.ZIP_STORED):
  """Writes a file as torch does, `without` files of the zip, or with `data` for its stream."""
  stream, storages = pickled(tree)
  entries = {"data.pkl": stream if data is None else data, "byteorder": order, "version": b"3\n"}
  entries |= {f"data/{key}": found.array.tobytes() for key, found in storages.items()}
  with zipfile.ZipFile(path, "w", compression) as archive:
    for name, content in entries.items():
      if name not in without:
        archive.writestr(f"archive/{name}", content)


def save_arrays(path, arrays):
  """Writes a dict of arrays, a storage each."""
  views = {name: View(Stored(arrays[name], str(at))) for at, name in enumerate(arrays)}
  save(path, views)
