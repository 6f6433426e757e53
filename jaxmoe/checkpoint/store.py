"""The store protocol, and how a run finds the newest intact step in one.

A step is one unit: named arrays (parameters, optimizer state, buffers) and a JSON record (step,
keys, data state, config). Names are canonical, one array a layer, whatever the run stacks. `like`
carries the target shardings, so any layout reads what any other wrote.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxmoe.checkpoint.manifest import DamagedStepError
from jaxmoe.checkpoint.step_reader import StepReader
from jaxmoe.core.errors import CheckpointError

DAMAGED = "damaged"
Arrays = dict[str, jax.Array]
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LazyArray:
  """An array that is made when its turn has come, and forgotten once it is written."""

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]


def nothing(name: str) -> None:
  """Does nothing with the name of an array."""


class Store(Protocol):
  """Keeps the newest steps of one run. Used by all processes alike, from one thread of each."""

  def write(self, step: int, arrays: Mapping[str, jax.Array], record: Record) -> None:
    """Starts to write a step newer than all others, and soon returns.

    The arrays may be donated as soon as it has returned. The step counts, and older ones beyond
    those kept are deleted, once it is wholly written. Raises CheckpointError if this or the
    write before failed; the store can then be written to again.
    """

  def write_streamed(
    self,
    step: int,
    arrays: Mapping[str, LazyArray],
    record: Record,
    alive: Callable[[str], None] = nothing,
  ) -> None:
    """Writes a step array by array, so that a model larger than memory is saved; blocks.

    By one process, into a folder that no run has open. None of the arrays may be without elements.
    `alive` is called with the name of each when it is written. Raises CheckpointError if the step
    could not be written; what making an array raises passes through. Either leaves no step.
    """

  def read(
    self, step: int, like: Mapping[str, jax.ShapeDtypeStruct], under: str = ""
  ) -> tuple[Arrays, Record]:
    """Returns the arrays and the record of a step, every bit as it was written.

    `like` must name all arrays whose names start with `under` and no others, with their shapes,
    dtypes and the shardings to read them in; else InputError. Raises DamagedStepError if the
    step is not intact, CheckpointError if it is not there or cannot be read at present.
    """

  def open_step(self, step: int) -> StepReader:
    """Returns what reads a step array by array on the host, in one process, without a layout.

    Raises DamagedStepError or CheckpointError as `read` does.
    """

  def contents(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of the arrays of a step by name, without reading any.

    Raises DamagedStepError or CheckpointError as `read` does.
    """

  def steps(self) -> list[int]:
    """Returns the steps wholly written and not set aside, oldest first.

    The same on every process after `wait`, not while a step is being written.
    """

  def wait(self) -> None:
    """Returns once everything is written. Raises CheckpointError if it could not be."""

  def set_aside(self, step: int, why: str, kind: str = DAMAGED) -> None:
    """Renames a step so that it never counts again; deletes nothing.

    A step that is not damaged but not wanted any more is of another `kind`.
    """

  def aside(self) -> list[str]:
    """Returns the names of what was set aside as damaged."""

  def unremoved(self) -> dict[int, str]:
    """Returns why old steps could not be removed, by step, and forgets it.

    They stay, and count; that a new step was written does not depend on it.
    """

  def close(self) -> None:
    """Waits, then releases threads and files. The store is not used afterwards."""


def read_latest(
  store: Store,
  like: Mapping[str, jax.ShapeDtypeStruct] | Callable[[int], Mapping[str, jax.ShapeDtypeStruct]],
  on_damage: Callable[[int, str], None],
  *,
  under: str = "",
  set_aside: bool = True,
) -> tuple[int, Arrays, Record] | None:
  """Returns step, arrays and record of the newest intact step, or None if there never was one.

  A damaged step is reported to `on_damage(step, why)` and set aside, and the one before is tried.
  With `set_aside=False` it stays: for commands that read what a live run may still write. `like`
  may be a function of the step, for stores whose steps do not all hold the same.

  Raises CheckpointError if there are or were steps and none is intact. InputError (the arrays
  are those of another model) passes through and sets nothing aside.
  """
  errors = []
  for step in reversed(store.steps()):
    try:
      wanted = like(step) if callable(like) else like
      arrays, record = store.read(step, wanted, under)
    except DamagedStepError as error:
      on_damage(step, str(error))
      errors.append(str(error))
      if set_aside:
        store.set_aside(step, str(error))
    else:
      return step, arrays, record
  if errors:
    raise CheckpointError(f"no intact checkpoint in {store}: {'; '.join(errors)}")
  if store.aside():
    raise CheckpointError(
      f"no intact checkpoint in {store}: all were set aside ({', '.join(store.aside())});"
      " to start anew, remove them"
    )
  return None


def read_record(store: Store, step: int) -> Record:
  """Returns what lies beside the arrays of a step, without reading any.

  Raises DamagedStepError or CheckpointError as `Store.read` does.
  """
  # No array has a name without a first piece.
  return store.read(step, {}, under="/")[1]
