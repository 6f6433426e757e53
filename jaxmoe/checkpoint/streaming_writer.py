"""Streaming writer: a step array by array, so that a model larger than memory is saved.

What is written is what `OrbaxStore` writes and reads: the same files, manifest and digests. Only
one array is in memory at a time. The caller sees to it that a step counts only when it is whole, as
by renaming the folder that everything lies in.
"""

import asyncio
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from jaxmoe.checkpoint.digest import digest
from jaxmoe.checkpoint.manifest import ArrayEntry, Manifest
from jaxmoe.checkpoint.store import Record
from jaxmoe.core.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class LazyArray:
  """An array that is made when its turn has come, and forgotten once it is written."""

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]


def write_streamed(
  path: str | os.PathLike[str],
  step: int,
  arrays: Mapping[str, LazyArray],
  record: Record,
  alive: Callable[[str], None] = lambda name: None,
) -> None:
  """Writes `PATH/STEP`, which must not exist, for an `OrbaxStore` of `path` to read.

  Args:
    path: Of the store.
    step: The step.
    arrays: By canonical name; none may be without elements.
    record: Plain JSON.
    alive: Called with the name of each array when it is written.

  Raises:
    CheckpointError: the disk refuses it. What making an array raises passes through.
  """
  folder = pathlib.Path(path).absolute() / str(step)
  handler = _LazyArrayHandler(alive)
  registry = type_handlers.create_type_handler_registry((LazyArray, handler))
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as writer:
      writer.save(folder / "arrays", args=ocp.args.PyTreeSave(dict(arrays)))
    manifest = folder / "label" / "metadata"
    manifest.parent.mkdir()
    sealed = Manifest(json.loads(json.dumps(record, allow_nan=False)), handler.entries).to_json()
    with open(manifest, "w", encoding="utf-8") as file:
      json.dump(sealed, file)
      file.flush()
      os.fsync(file.fileno())
  except Exception as error:
    if handler.failure is not None:
      raise handler.failure from None
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    raise CheckpointError(f"{path}: saving step {step} failed: {text}") from error


class _LazyArrayHandler(type_handlers.ArrayHandler):
  """Makes, digests and writes one array after the other.

  Attributes:
    entries: What the manifest says of those written.
    failure: What making an array raised.
  """

  def __init__(self, alive: Callable[[str], None]):
    super().__init__(enable_write_sharding_file=False)
    self.entries: dict[str, ArrayEntry] = {}
    self.failure: Exception | None = None
    self._alive = alive

  async def serialize(
    self,
    values: Sequence[Any],
    infos: Sequence[type_handlers.ParamInfo],
    args: Sequence[ocp.SaveArgs] | None = None,
  ) -> Sequence[Any]:
    """Returns no futures: everything is on the disk when it returns."""
    for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values)):
      array = self._made(value, info.name)
      words = digest({info.name: array})[info.name]
      for future in await super().serialize([array], [info], [arg]):
        await asyncio.to_thread(future.result)
      self.entries[info.name] = ArrayEntry(tuple(array.shape), array.dtype.name, words)
      self._alive(info.name)
    return []

  def _made(self, value: LazyArray, name: str) -> jax.Array:
    try:
      array = jnp.asarray(value.make())
    except Exception as error:
      self.failure = error
      raise
    assert (array.shape, array.dtype) == (value.shape, value.dtype), name
    return array
