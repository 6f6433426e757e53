"""Steps as the folders of a directory: the part of a store that is alike whatever a step holds."""

import json
import os
import pathlib
from typing import ClassVar

from jaxmoe.checkpoint.step_reader import StepReader
from jaxmoe.checkpoint.store import DAMAGED
from jaxmoe.core import multihost
from jaxmoe.core.errors import CheckpointError, InputError

WHY = "WHY.txt"
"""Says, in a step that was set aside, why."""


class DirectoryStore:
  """A store whose step is the directory `PATH/STEP`, made at the first write.

  It is written under another name, which starts with `STEP.`, and renamed when whole.

  Attributes:
    marks: What lies in a step of this kind, and in none of another; one of them tells it.
  """

  marks: ClassVar[tuple[str, ...]] = ()

  def __init__(self, path: str | os.PathLike, keep: int = 3):
    if keep < 1:
      raise InputError(f"a store must keep at least one step, got {keep=}")
    self._path = pathlib.Path(path).absolute()
    self._keep = keep

  def __str__(self) -> str:
    return str(self._path)

  @property
  def folder(self) -> pathlib.Path:
    """The directory, absolute; it need not be there."""
    return self._path

  def open_step(self, step: int) -> StepReader:
    """Returns what reads a step array by array on the host."""
    raise NotImplementedError

  def steps(self) -> list[int]:
    """Returns the steps wholly written and not set aside, oldest first."""
    with multihost.raise_on_all():
      names = self.names()
    found = sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)
    # A shared folder need not look the same from everywhere at every time.
    return json.loads(multihost.broadcast(json.dumps(found)))

  def set_aside(self, step: int, why: str, kind: str = DAMAGED) -> None:
    """Renames `STEP` to `STEP.KIND` and writes the reason into `WHY.txt` there."""
    if multihost.is_main_process():
      source = self._path / str(step)
      target = self._path / f"{step}.{kind}"
      count = 1
      while target.exists():
        count += 1
        target = self._path / f"{step}.{kind}.{count}"
      source.rename(target)
      (target / WHY).write_text(why + "\n")
    multihost.all_gather_text(
      ""
    )  # process 0 renames: without this another one might look at what was

  def aside(self) -> list[str]:
    """Returns the names of the directories of what was set aside as damaged."""
    with multihost.raise_on_all():
      found = sorted(name for name in self.names() if f".{DAMAGED}" in name)
    return json.loads(multihost.broadcast(json.dumps(found)))

  def names(self) -> list[str]:
    """Returns the names of the folders in the store's, none where that is not there."""
    try:
      return [entry.name for entry in os.scandir(self._path) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
      return []
    except OSError as error:
      raise CheckpointError(
        f"{self}: cannot be read ({error.strerror}); see that you may read it, and that its disk "
        "answers"
      ) from None
