"""Streaming writer of Orbax: a step array by array, of which only one is in memory at a time.

What is written is what `OrbaxStore` writes and reads: the same files, manifest and digests. The
caller sees to it that a step counts only when it is whole.
"""

import asyncio
import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from jaxmoe.checkpoint.digest import digest
from jaxmoe.checkpoint.manifest import ArrayEntry, Manifest
from jaxmoe.checkpoint.store import LazyArray, Record
from jaxmoe.core.errors import CheckpointError


def stream_arrays(
  folder: pathlib.Path,
  arrays: Mapping[str, LazyArray],
  record: Record,
  alive: Callable[[str], None],
  write_errors: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
  """Writes what a step of an `OrbaxStore` holds into a folder, which must not exist.

  Args:
    folder: Absolute.
    arrays: By canonical name; none may be without elements.
    record: Plain JSON.
    alive: Called with the name of each array when it is written.
    write_errors: Turns what is raised into errors of the store; not what making an array raises.
  """
  handler = _LazyArrayHandler(alive)
  registry = type_handlers.create_type_handler_registry((LazyArray, handler))
  try:
    with write_errors():
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as writer:
        writer.save(folder / "arrays", args=ocp.args.PyTreeSave(dict(arrays)))
      manifest = folder / "label" / "metadata"
      manifest.parent.mkdir()
      sealed = Manifest(json.loads(json.dumps(record, allow_nan=False)), handler.entries).to_json()
      with open(manifest, "w", encoding="utf-8") as file:
        json.dump(sealed, file)
        file.flush()
        os.fsync(file.fileno())
  except CheckpointError:
    if handler.failure is not None:
      raise handler.failure from None
    raise


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
