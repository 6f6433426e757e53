"""A check that the checkpoints which a run has saved are still where it saved them.

A folder of checkpoints that is empty, deleted or on a disk that is not mounted looks as that of a
run which never saved, and such a run starts anew. events.jsonl tells them apart.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.train.run_log import read_lines

_DAMAGED = ".damaged"  # as a store names what it sets aside; its package brings JAX along
ORIGINS = ("surgery", "convert")
"""Events of a run that was made with a checkpoint of step 0."""


def check_saved(checkpoints: pathlib.Path, events: pathlib.Path) -> None:
  """Returns if a run may start anew or has a step to go on from, as far as names tell.

  Args:
    checkpoints: The folder of its steps.
    events: Its events.jsonl.

  Raises:
    CheckpointError: events say that steps were saved, and none is there.
    InputError: nothing was saved yet, and nothing can be: the folder is a file or a dead link.
  """
  names = _names(checkpoints)
  if any(name.isdecimal() or _DAMAGED in name for name in names):
    return  # what is set aside as damaged is told by who looks for an intact step
  last_step = last_saved(read_lines(events), names)
  if last_step is not None:
    raise CheckpointError(
      f"{checkpoints}: step {last_step} was saved, says events.jsonl, and no step is there"
      f"{_why(checkpoints)}; bring them back (is a disk not mounted?), or start anew elsewhere"
    )
  if os.path.lexists(checkpoints) and not os.path.isdir(checkpoints):
    raise InputError(f"{checkpoints}: is no folder{_why(checkpoints)}; make one, or take it away")


def last_saved(events: Iterable[Mapping[str, Any]], names: Collection[str] = ()) -> int | None:
  """Returns the last step that events say was wholly saved, None where a run may start anew.

  Args:
    events: All events, in order.
    names: Of what lies in the folder of checkpoints: half written steps, and `STEP.undone`, from
      which a run went back to its very start.
  """
  saved: int | None = None
  begun: int | None = None
  made = False
  for event in events:
    kind, step = event.get("event"), event.get("step")
    made = made or kind in ORIGINS
    if kind == "rollback":
      saved, begun = event.get("to") or None, None
    elif kind == "start" or (kind == "save_failed" and step == begun):
      begun = None  # after a start it had not become whole, or the run would have gone on from it
    elif kind in ("checkpoint", "save_failed"):  # written once the save before is known to be whole
      saved, begun = (saved if begun is None else begun), (step if kind == "checkpoint" else None)
    elif kind in ("resume", "done", "stopped"):
      saved, begun = step, None
  if begun is not None and not any(
    name.startswith((f"{begun}.orbax", f"{begun}.partial")) for name in names
  ):
    saved = begun  # nothing half written is left of it
  undone = any(name.startswith(f"{saved}.undone") for name in names)
  return (0 if made else None) if saved is None or undone else saved


def was_made(events: Iterable[Mapping[str, Any]]) -> bool:
  """Whether a run's first state is not that of its seed but was saved as step 0."""
  return any(event.get("event") in ORIGINS for event in events)


def _names(folder: pathlib.Path) -> list[str]:
  try:
    return os.listdir(folder)
  except (FileNotFoundError, NotADirectoryError):
    return []
  except OSError as error:
    raise CheckpointError(
      f"{folder}: cannot be read ({error.strerror}); see that you may read it, and that its disk "
      "answers"
    ) from None


def _why(folder: pathlib.Path) -> str:
  """Returns where a link that leads nowhere leads to."""
  return f" (it is a link to {os.readlink(folder)})" if os.path.islink(folder) else ""
