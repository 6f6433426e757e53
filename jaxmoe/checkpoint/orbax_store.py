"""An Orbax store: steps in a directory; asynchronous, atomic, any layout reads any layout.

A step is the directory `PATH/STEP`, written under another name and renamed when whole:
`arrays/` is Orbax's (OCDBT), `label/metadata` the JSON manifest with the caller's record, every
array's digest and a hash of itself. Orbax notices neither a flipped bit nor some kinds of missing
files, so what counts as intact is decided by the manifest alone, after every read.
"""

import asyncio
import contextlib
import functools
import json
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from jaxmoe.checkpoint.digest import launch_digest
from jaxmoe.checkpoint.directory_store import DirectoryStore
from jaxmoe.checkpoint.manifest import (
  DamagedStepError,
  Manifest,
  check_digests,
  check_requested,
  make_manifest,
  parse_manifest,
)
from jaxmoe.checkpoint.process_parts import has_part, on_all_processes, part_of_none, widened
from jaxmoe.checkpoint.read_error import one_line, read_error
from jaxmoe.checkpoint.step_deleter import TolerantDeleter
from jaxmoe.checkpoint.step_reader import StepReader
from jaxmoe.checkpoint.store import DAMAGED, Arrays, LazyArray, Record, nothing
from jaxmoe.checkpoint.streaming_writer import stream_arrays
from jaxmoe.core import multihost
from jaxmoe.core.errors import CheckpointError, InputError

_UNWRITABLE = ("uint2", "uint4")


class OrbaxStore(DirectoryStore):
  """A store in a local or shared directory, made at the first write.

  On CPU a save keeps NumPy views of the arrays until it is done; JAX then copies instead of
  donating them, so for that long the state takes twice its memory. Reading needs no write access.
  """

  marks: ClassVar[tuple[str, ...]] = ("label", "arrays", "_CHECKPOINT_METADATA")

  def __init__(self, path: str | os.PathLike, keep: int = 3):
    super().__init__(path, keep)
    self._manager: ocp.CheckpointManager | None = None
    self._deleter: TolerantDeleter | None = None
    self._writing: int | None = None
    self._apart = False  # whether arrays are written that some processes have no part of

  def write(self, step: int, arrays: Mapping[str, jax.Array], record: Record) -> None:
    """Starts to write a step; returns once the arrays are copied or held on the host.

    Waits for the write before, if that is not done yet, and raises its error.
    """
    for name, x in arrays.items():
      if x.dtype.name in _UNWRITABLE:
        raise InputError(f"{name}: this store cannot hold {x.dtype.name}; use int4 or uint8")
    words = launch_digest(arrays)
    self.wait()
    written = self.steps()
    if written and step <= written[-1]:
      raise InputError(f"{self}: steps are written in order, got {step} after {written[-1]}")
    manifest = make_manifest(record, arrays, words)
    # Orbax refuses arrays without elements; the manifest says all there is to say of them.
    stored = {name: x for name, x in arrays.items() if x.size}
    items = {"label": ocp.args.JsonSave(manifest.to_json())}
    apart = not all(on_all_processes(x.sharding) for x in stored.values())
    if stored:
      save = ocp.args.PyTreeSave if apart else ocp.args.StandardSave
      items["arrays"] = save(widened(stored))
    if apart != self._apart:
      self._drop_manager()
    self._apart = apart
    self._writing = step
    try:
      with multihost.raise_on_all(), self._write_errors():
        self._try_folder()
      with multihost.raise_on_all(), self._write_errors():
        if not self._open().save(step, args=ocp.args.Composite(**items)):
          raise RuntimeError("Orbax declined to save")
    except CheckpointError:
      self._drop_manager()  # also where it was another process that failed
      raise

  def write_streamed(
    self,
    step: int,
    arrays: Mapping[str, LazyArray],
    record: Record,
    alive: Callable[[str], None] = nothing,
  ) -> None:
    """Writes a step array by array; blocks until it is on the disk."""
    written = self.steps()
    if written and step <= written[-1]:
      raise InputError(f"{self}: steps are written in order, got {step} after {written[-1]}")
    half = self._path / f"{step}.partial"
    shutil.rmtree(half, ignore_errors=True)  # of a process that was killed
    self._writing = step
    try:
      stream_arrays(half, arrays, record, alive, self._write_errors)
      with self._write_errors():
        half.rename(self._path / str(step))
    finally:
      self._writing = None
      shutil.rmtree(half, ignore_errors=True)

  def read(
    self, step: int, like: Mapping[str, jax.ShapeDtypeStruct], under: str = ""
  ) -> tuple[Arrays, Record]:
    """Returns the arrays and the record of a step, every bit as it was written."""
    path = self._path / str(step)
    steps = self.steps()
    with multihost.raise_on_all():
      manifest = self._read_manifest(path, steps)
      check_requested(manifest, like, under, str(path))
    stored = {name: x for name, x in like.items() if np.prod(x.shape)}
    with multihost.raise_on_all():
      arrays = _restore(path / "arrays", stored) if stored else {}
    arrays |= {name: _empty(x) for name, x in like.items() if name not in stored}
    check_digests(manifest, arrays, str(path))
    return arrays, manifest.record

  def open_step(self, step: int) -> StepReader:
    """Returns what reads a step array by array on the host."""
    path = self._path / str(step)
    manifest = self._read_manifest(path, self.steps())
    return StepReader(manifest, str(path), functools.partial(_fetch, path / "arrays"))

  def contents(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of the arrays of a step by name, without reading any."""
    steps = self.steps()
    with multihost.raise_on_all():
      return self._read_manifest(self._path / str(step), steps).shapes()

  def unremoved(self) -> dict[int, str]:
    """Returns why old steps could not be removed, by step, and forgets it."""
    return self._deleter.take() if self._deleter is not None else {}

  def wait(self) -> None:
    """Returns once everything is written. Raises CheckpointError if it could not be."""
    if self._writing is not None:
      # What one process could not write, none has. Process 0 renames and deletes: without this
      # another one might look at what was.
      try:
        with multihost.raise_on_all(), self._write_errors():
          self._open().wait_until_finished()
      except CheckpointError:
        self._drop_manager()
        raise
    self._writing = None

  def set_aside(self, step: int, why: str, kind: str = DAMAGED) -> None:
    """Renames `STEP` to `STEP.KIND` and writes the reason into `WHY.txt` there."""
    super().set_aside(step, why, kind)
    if self._manager is not None:
      self._manager.reload()

  def close(self) -> None:
    """Waits, then ends Orbax's threads."""
    try:
      self.wait()
    finally:
      self._drop_manager()

  def _open(self) -> ocp.CheckpointManager:
    """The Orbax manager that writes; made late, so that a store only read makes nothing."""
    if self._manager is None:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=self._keep,
        # A directory that cannot be made later leaves threads that wait for it, and keep the
        # process from ending, for 300 s.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        cleanup_tmp_directories=True,  # left by a killed or failed save
        save_root_metadata=False,
      )
      handlers = None
      if self._apart:
        first_replica = type_handlers.ArrayHandler(use_replica_parallel=False)
        handlers = {"arrays": _handler(first_replica), "label": ocp.JsonCheckpointHandler()}
      self._manager = ocp.CheckpointManager(self._path, options=options, item_handlers=handlers)
      # Orbax has no other place for it.
      self._deleter = TolerantDeleter(self._manager._checkpoint_deleter)
      self._manager._checkpoint_deleter = self._deleter
    return self._manager

  def _try_folder(self) -> None:
    """Raises OSError where process 0 cannot write: the others would wait for it inside Orbax."""
    if multihost.is_multi_process() and multihost.is_main_process():
      self._path.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=self._path) as file:
        file.write(b"\0" * 4096)
        file.flush()
        os.fsync(file.fileno())

  def _drop_manager(self) -> None:
    """Ends the manager; it may not be usable, or raise once more what it raised before."""
    manager, self._manager, self._writing = self._manager, None, None
    if manager is not None:
      with contextlib.suppress(Exception):
        manager.close()

  @contextlib.contextmanager
  def _write_errors(self) -> Iterator[None]:
    """Turns whatever Orbax raises into CheckpointError, and starts afresh after it."""
    try:
      yield
    except Exception as error:
      step = self._writing
      self._drop_manager()
      raise CheckpointError(f"{self}: saving step {step} failed: {one_line(error)}") from error

  def _read_manifest(self, path: pathlib.Path, steps: list[int]) -> Manifest:
    if not path.is_dir():
      raise CheckpointError(f"{self}: there is no step {path.name}, only {steps}")
    file = path / "label" / "metadata"
    try:
      sealed = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
      raise read_error(file, error) from error
    return parse_manifest(sealed, file)


def quiet_orbax() -> None:
  """Keeps off the terminal what Orbax logs, pages of errors we report ourselves above all.

  Changes logging for the whole process, so it is for `launch` and the set-up of tests. A failed
  save also leaves Orbax's writing threads without their event loop, which Python reports through
  asyncio's logger and `sys.unraisablehook`.
  """
  for name in ("absl", "asyncio"):
    logger = logging.getLogger(name)
    if not any(isinstance(each, _NotFromOrbax) for each in logger.filters):
      logger.addFilter(_NotFromOrbax())
  before = sys.unraisablehook

  def hook(unraisable: "sys.UnraisableHookArgs") -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      before(unraisable)

  sys.unraisablehook = hook


class _NotFromOrbax(logging.Filter):
  """Drops what was logged by a file of Orbax, or about an exception raised in one or below it."""

  def filter(self, record: logging.LogRecord) -> bool:
    orbax = f"{os.sep}orbax{os.sep}checkpoint"
    if orbax in record.pathname:
      return False
    error, trace = record.exc_info[1:] if record.exc_info else (None, None)
    # Of several arrays that cannot be written Orbax awaits the first; the others are reported, most
    # without a trace, whenever they are collected.
    marks = ("tensorstore", ".orbax-checkpoint-tmp")
    if record.name == "asyncio" and any(mark in str(error) for mark in marks):
      return False
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    return not any(orbax in file for file in files)


def _restore(path: pathlib.Path, like: dict[str, jax.ShapeDtypeStruct]) -> Arrays:
  """The named arrays, in the layout of `like`; whatever else lies there is not read."""
  here = {name: x for name, x in like.items() if has_part(x.sharding)}
  restore_args = {
    name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
    for name, x in here.items()
  }
  args = ocp.args.PyTreeRestore(item=here, restore_args=restore_args, partial_restore=True)
  mine = jax.process_index()  # waits for no other, which may have found that it cannot read
  alone = ocp.options.MultiprocessingOptions(mine, {mine}, f"reader_{mine}")
  handler = _handler(_PatientArrayHandler(), alone)
  try:
    with contextlib.closing(
      ocp.Checkpointer(handler, multiprocessing_options=alone)
    ) as checkpointer:
      arrays = checkpointer.restore(path, args=args) if here else {}
  except Exception as error:
    raise read_error(path, error) from error
  for name in here:
    if not isinstance(arrays.get(name), jax.Array):
      raise DamagedStepError(f"{path}: {name} is missing")
  return arrays | {name: part_of_none(x) for name, x in like.items() if name not in here}


def _handler(
  of_arrays: type_handlers.ArrayHandler, processes: ocp.options.MultiprocessingOptions | None = None
) -> ocp.PyTreeCheckpointHandler:
  """What reads and writes arrays with a handler of ours."""
  registry = type_handlers.create_type_handler_registry((jax.Array, of_arrays))
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=registry,
    multiprocessing_options=processes or ocp.options.MultiprocessingOptions(),
  )


def _fetch(path: pathlib.Path, name: str) -> np.ndarray:
  """The named array, on the host."""
  one = ocp.RestoreArgs(restore_type=np.ndarray)
  args = ocp.args.PyTreeRestore(item={name: 0}, restore_args={name: one}, partial_restore=True)
  try:
    with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as checkpointer:
      array = checkpointer.restore(path, args=args)[name]
  except Exception as error:
    raise read_error(path, error) from error
  if not isinstance(array, np.ndarray):
    raise DamagedStepError(f"{path}: {name} is missing")
  return array


class _PatientArrayHandler(type_handlers.ArrayHandler):
  """Reads arrays; when one cannot be read, waits for the others before it says so.

  Orbax itself closes its event loop under them, and Python then prints, at some later time and
  from other threads, a page for each.
  """

  async def deserialize(
    self,
    infos: Sequence[type_handlers.ParamInfo],
    args: Sequence[ocp.RestoreArgs] | None = None,
  ) -> Sequence[jax.Array]:
    before = asyncio.all_tasks()
    try:
      return await super().deserialize(infos, args)
    except Exception:
      while rest := [task for task in asyncio.all_tasks() - before if not task.done()]:
        await asyncio.gather(*rest, return_exceptions=True)
      raise


def _empty(like: jax.ShapeDtypeStruct) -> jax.Array:
  """An array without elements."""
  part = np.zeros(like.shape, like.dtype)
  return jax.make_array_from_callback(like.shape, like.sharding, lambda index: part[index])
