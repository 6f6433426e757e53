"""Deletes old steps, and never fails a save over one that cannot be removed."""

from collections.abc import Sequence
from typing import Protocol


class StepDeleter(Protocol):
  """What Orbax calls once a step is wholly written."""

  def delete(self, step: int) -> None:
    """Removes a step."""

  def close(self) -> None:
    """Ends what it started."""


class TolerantDeleter:
  """A deleter of Orbax that goes on past errors and remembers them.

  Orbax takes a step that it cannot remove (a file that a virus scanner holds, another user's, one
  that is immutable) for a failed save, though the new step is on the disk and counts.
  """

  def __init__(self, deleter: StepDeleter):
    self._deleter = deleter
    self._failed: dict[int, str] = {}

  def delete(self, step: int) -> None:
    """Removes a step, or remembers why that failed."""
    try:
      self._deleter.delete(step)
    except Exception as error:
      self._failed[step] = " ".join(f"{type(error).__name__}: {error}".split())

  def delete_steps(self, steps: Sequence[int]) -> None:
    """Removes several; called in Orbax's thread."""
    for step in steps:
      self.delete(step)

  def close(self) -> None:
    """Ends what the deleter started."""
    self._deleter.close()

  def take(self) -> dict[int, str]:
    """Returns why each of some steps could not be removed, and forgets it."""
    failed, self._failed = self._failed, {}
    return failed
