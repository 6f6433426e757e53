"""An NPZ store: a step is `arrays.npz` and `manifest.json`, which NumPy and any text editor read.

For one process, and for those who take a checkpoint elsewhere: `np.load` gives the bytes of every
array by its canonical name, the manifest its dtype and shape. What counts as intact is decided by
the manifest's digests, as in every store.
"""

import json
import os
import pathlib
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.digest import digest, launch_digest
from jaxmoe.checkpoint.directory_store import DirectoryStore
from jaxmoe.checkpoint.manifest import (
  ArrayEntry,
  Manifest,
  check_digests,
  check_requested,
  make_manifest,
  parse_manifest,
)
from jaxmoe.checkpoint.read_error import one_line, read_error
from jaxmoe.checkpoint.step_reader import StepReader
from jaxmoe.checkpoint.store import Arrays, LazyArray, Record, nothing
from jaxmoe.core import multihost
from jaxmoe.core.errors import CheckpointError, InputError

ARRAYS, MANIFEST = "arrays.npz", "manifest.json"
_PARTIAL = ".partial"
_DAMAGE = (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile)


class NpzStore(DirectoryStore):
  """A store of plain files in a directory; writing blocks until they are on the disk."""

  marks: ClassVar[tuple[str, ...]] = (ARRAYS, MANIFEST)

  def __init__(self, path: str | os.PathLike, keep: int = 3):
    if multihost.is_multi_process():
      raise InputError(
        f"{path}: a store of .npz files holds whole arrays and is for one process; "
        "set --config.train.store=orbax, in another workdir where steps are already there"
      )
    super().__init__(path, keep)
    self._failed: dict[int, str] = {}

  def write(self, step: int, arrays: Mapping[str, jax.Array], record: Record) -> None:
    """Writes a step, then deletes what is beyond those kept."""
    written = self._earlier(step)
    manifest = make_manifest(record, arrays, launch_digest(arrays))
    self._write(step, arrays.items(), lambda: manifest)
    for old in [*written, step][: -self._keep]:
      try:
        shutil.rmtree(self._path / str(old))
      except OSError as error:
        self._failed[old] = one_line(error)

  def write_streamed(
    self,
    step: int,
    arrays: Mapping[str, LazyArray],
    record: Record,
    alive: Callable[[str], None] = nothing,
  ) -> None:
    """Writes a step array by array."""
    self._earlier(step)
    entries: dict[str, ArrayEntry] = {}
    failures: list[Exception] = []

    def made() -> Iterable[tuple[str, jax.Array]]:
      for name, lazy in arrays.items():
        try:
          array = jnp.asarray(lazy.make())
        except Exception as error:
          failures.append(error)
          raise
        assert (array.shape, array.dtype) == (lazy.shape, lazy.dtype), name
        words = digest({name: array})[name]
        entries[name] = ArrayEntry(tuple(array.shape), array.dtype.name, words)
        yield name, array
        alive(name)

    plain = json.loads(json.dumps(record, allow_nan=False))
    try:
      self._write(step, made(), lambda: Manifest(plain, entries))
    except CheckpointError:
      if failures:
        raise failures[0] from None
      raise
    finally:
      shutil.rmtree(self._path / f"{step}{_PARTIAL}", ignore_errors=True)

  def _earlier(self, step: int) -> list[int]:
    """Returns the steps that are there, all of them before `step`."""
    written = self.steps()
    if written and step <= written[-1]:
      raise InputError(f"{self}: steps are written in order, got {step} after {written[-1]}")
    return written

  def _write(
    self, step: int, arrays: Iterable[tuple[str, jax.Array]], manifest: Callable[[], Manifest]
  ) -> None:
    """Writes a step under another name, array by array, then the manifest; and renames it."""
    try:
      for name in self.names():
        if name.endswith(_PARTIAL):  # of a save that was killed
          shutil.rmtree(self._path / name)
      partial = self._path / f"{step}{_PARTIAL}"
      partial.mkdir(parents=True)
      with open(partial / ARRAYS, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive:  # as np.savez does, one array at a time
          for name, x in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as one:
              np.lib.format.write_array(one, _raw(x), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
      with open(partial / MANIFEST, "w", encoding="utf-8") as text:
        json.dump(manifest().to_json(), text)
        text.flush()
        os.fsync(text.fileno())
      partial.rename(self._path / str(step))
    except OSError as error:
      raise CheckpointError(f"{self}: saving step {step} failed: {one_line(error)}") from error

  def read(
    self, step: int, like: Mapping[str, jax.ShapeDtypeStruct], under: str = ""
  ) -> tuple[Arrays, Record]:
    """Returns the arrays and the record of a step, every bit as it was written."""
    path, manifest = self._path / str(step), self._manifest(step)
    check_requested(manifest, like, under, str(path))
    arrays = {}
    try:
      with open(path / ARRAYS, "rb") as file, np.load(file, allow_pickle=False) as held:
        for name, x in like.items():
          whole = held[name].view(x.dtype).reshape(x.shape)
          arrays[name] = jax.device_put(whole, x.sharding)
    except (*_DAMAGE, zlib.error) as error:
      raise read_error(path / ARRAYS, error) from error
    check_digests(manifest, arrays, str(path))
    return arrays, manifest.record

  def open_step(self, step: int) -> StepReader:
    """Returns what reads a step array by array on the host."""
    path, manifest = self._path / str(step), self._manifest(step)

    def fetch(name: str) -> np.ndarray:
      entry = manifest.arrays[name]
      try:
        with open(path / ARRAYS, "rb") as file, np.load(file, allow_pickle=False) as held:
          return held[name].view(jnp.dtype(entry.dtype)).reshape(entry.shape)
      except (*_DAMAGE, zlib.error) as error:
        raise read_error(path / ARRAYS, error) from error

    return StepReader(manifest, str(path), fetch)

  def contents(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of the arrays of a step by name, without reading any."""
    return self._manifest(step).shapes()

  def wait(self) -> None:
    """Returns at once: writes are not asynchronous here."""

  def unremoved(self) -> dict[int, str]:
    """Returns why old steps could not be removed, by step, and forgets it."""
    failed, self._failed = self._failed, {}
    return failed

  def close(self) -> None:
    """Does nothing: no thread and no file is open."""

  def _manifest(self, step: int) -> Manifest:
    path: pathlib.Path = self._path / str(step)
    if not path.is_dir():
      raise CheckpointError(f"{self}: there is no step {step}, only {self.steps()}")
    try:
      sealed = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
      raise read_error(path / MANIFEST, error) from error
    return parse_manifest(sealed, path / MANIFEST)


def _raw(x: jax.Array) -> np.ndarray:
  """Returns the bytes of an array: NumPy's own files know no bfloat16."""
  return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)
