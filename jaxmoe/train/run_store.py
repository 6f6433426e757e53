"""The checkpoints of a run that is there: at least one, or one line that says what is wrong."""

from __future__ import annotations

from jaxmoe.checkpoint import Store, open_store
from jaxmoe.core.errors import NoRunError
from jaxmoe.train.saved_steps import check_saved
from jaxmoe.train.workdir import Workdir


def need_store(workdir: Workdir) -> Store:
  """Returns the checkpoints of a run, of which there is one at least.

  Raises:
    NoRunError: there is none yet.
    CheckpointError: those that were saved are not there.
  """
  check_saved(workdir.checkpoints, workdir.events)
  store = open_store(workdir.checkpoints)
  if not store.steps() and not store.aside():
    raise no_checkpoint(workdir)
  return store


def is_trained(workdir: Workdir) -> bool:
  """Whether any step but the first is saved: what was converted is there at step 0."""
  return any(open_store(workdir.checkpoints).steps())


def no_checkpoint(workdir: Workdir) -> NoRunError:
  """Returns the error of a run that has not saved anything yet."""
  return NoRunError(f"{workdir.path}: no checkpoint yet; train first")
