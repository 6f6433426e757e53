"""The steps of a folder, whole or not: what each holds, its size, and why it does not count."""

import dataclasses
import math
import pathlib
import re

import jax.numpy as jnp

from jaxmoe.checkpoint.directory_store import WHY, DirectoryStore
from jaxmoe.core.errors import CheckpointError

WHOLE, HALF_WRITTEN = "whole", "half written"
_NAME = re.compile(r"([0-9]+)(?:\.(.+))?")


@dataclasses.dataclass(frozen=True)
class ListedStep:
  """A folder of a step.

  Attributes:
    step: Its number.
    name: That of the folder.
    state: WHOLE, HALF_WRITTEN, or the kind that it was set aside as (`damaged`).
    why: Why it was set aside, or why its manifest is not one; empty where nothing is wrong.
    num_arrays: Arrays that it holds; None where no manifest tells.
    num_bytes: Of their values.
    bytes_on_disk: Of its files.
    written_unix_s: When its folder was last changed.
  """

  step: int
  name: str
  state: str
  why: str
  num_arrays: int | None
  num_bytes: int | None
  bytes_on_disk: int
  written_unix_s: float


def list_steps(store: DirectoryStore) -> list[ListedStep]:
  """Returns all steps that lie in a store's folder, oldest first, reading no array."""
  found = []
  for match in filter(None, map(_NAME.fullmatch, store.names())):
    try:
      found.append(_listed(store, int(match[1]), match[2], store.folder / match[0]))
    except FileNotFoundError:  # a live run has renamed or deleted it
      continue
  return sorted(found, key=lambda one: (one.step, one.name))


def _listed(store: DirectoryStore, step: int, suffix: str | None, path: pathlib.Path) -> ListedStep:
  state, why, number, num_bytes = HALF_WRITTEN, "", None, None
  if suffix is None:
    state = WHOLE
    try:
      arrays = store.open_step(step).manifest.arrays
    except CheckpointError as error:
      why = str(error)
    else:
      number = len(arrays)
      sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays.values())
      num_bytes = sum(sizes)
  elif (path / WHY).is_file():
    state, why = suffix.partition(".")[0], (path / WHY).read_text().strip()
  on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
  written_unix_s = path.stat().st_mtime
  return ListedStep(step, path.name, state, why, number, num_bytes, on_disk, written_unix_s)
