"""The kinds of store, and the store of a folder by what is there."""

import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from jaxmoe.checkpoint.directory_store import DirectoryStore
from jaxmoe.checkpoint.memory_store import MemoryStore
from jaxmoe.checkpoint.npz_store import NpzStore
from jaxmoe.checkpoint.orbax_store import OrbaxStore
from jaxmoe.checkpoint.store import Store
from jaxmoe.core import multihost
from jaxmoe.core.errors import InputError

# name: (class, a tiny instance for the contract test, given an empty directory)
STORES: dict[str, tuple[type, Callable[[str | os.PathLike], Store]]] = {
  "memory": (MemoryStore, lambda path: MemoryStore(keep=2)),
  "orbax": (OrbaxStore, lambda path: OrbaxStore(path, keep=2)),
  "npz": (NpzStore, lambda path: NpzStore(path, keep=2)),
}

CHECKPOINTS = "checkpoints"
"""The folder of the steps in that of a run."""

_STEP = re.compile(r"[0-9]+(\..*)?")  # whole, half written or set aside


def open_store(path: str | os.PathLike[str], kind: str = "orbax", keep: int = 3) -> Store:
  """Returns the store of a run: of the kind that wrote what is there, else of `kind`.

  Called by all processes alike; makes nothing.

  Args:
    path: The folder of a run, or that of its steps.
    kind: The name in STORES of what is to be written where there is no step yet.
    keep: Steps that are kept when another is written.

  Raises:
    InputError: the folder holds steps of no store that is known, or of two; or no step, and other
      things than a run has.
    CheckpointError: it cannot be read.
  """
  kinds = on_disk()
  folder = pathlib.Path(path).absolute()
  if folder.name != CHECKPOINTS and (folder / CHECKPOINTS).is_dir():
    folder /= CHECKPOINTS
  with multihost.raise_on_all():
    found = _kinds_in(folder, kinds)
  # A shared folder need not look the same from everywhere at every time.
  found = json.loads(multihost.broadcast(json.dumps(found))) or [kind]
  if len(found) > 1:
    raise InputError(
      f"{folder}: holds steps of two kinds ({' and '.join(found)}); move those of one elsewhere"
    )
  if found[0] not in kinds:
    raise InputError(f"no store on a disk is called {found[0]!r}; there are {', '.join(kinds)}")
  return kinds[found[0]](folder, keep)


def on_disk() -> dict[str, type[Any]]:
  """Returns the stores of STORES whose steps stay when the process ends, by name."""
  return {name: each for name, (each, _) in STORES.items() if issubclass(each, DirectoryStore)}


def _kinds_in(folder: pathlib.Path, kinds: dict[str, type[Any]]) -> list[str]:
  """Returns the names of the stores whose steps lie in a folder."""
  steps = [folder / name for name in DirectoryStore(folder).names() if _STEP.fullmatch(name)]
  found = [
    name for name, each in kinds.items()
    if any((step / mark).exists() for step in steps for mark in each.marks)
  ]  # fmt: skip
  strange = [step.name for step in steps if not found and any(step.iterdir())]
  if strange:
    raise InputError(
      f"{folder}: {strange[0]} is a step of no store that is known ({', '.join(kinds)}); give the "
      "folder of a run"
    )
  if not steps and folder.name != CHECKPOINTS and folder.is_dir() and any(folder.iterdir()):
    raise InputError(f"{folder}: holds no checkpoint; give the folder of a run that has some")
  return found
