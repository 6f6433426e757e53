"""The errors a command line turns into one line and an exit code.

Everything else that is raised is a defect and keeps its traceback.
"""


class UserFacingError(Exception):
  """The base of errors that all processes of a run meet alike and tell in one line."""

  code: int


class InputError(UserFacingError, ValueError):
  """A user's mistake: bad flag, field, file or shape. Exit code 2, nothing written.

  The message is one line: what is wrong, where, why, and the fix.
  """

  code = 2


class NotFiniteError(UserFacingError, RuntimeError):
  """Steps were skipped or rolled back more often than the budget allows. Exit code 3."""

  code = 3


class CheckpointError(UserFacingError, RuntimeError):
  """No intact checkpoint is left, or saving failed. Exit code 4."""

  code = 4


class NoRunError(CheckpointError, InputError):
  """There is no run in a folder, or no checkpoint of it yet. Exit code 4, nothing written."""


class DropError(UserFacingError, RuntimeError):
  """A layer dropped a larger share of its choices than its recipe allows. Exit code 5."""

  code = 5


class PeerError(RuntimeError):
  """Another process of the run died; the same command goes on. Exit code 43."""

  code = 43


def machine_error(error: BaseException) -> InputError | None:
  """Returns the line for what a machine refused: a disk, a permission, memory; None for a defect.

  For what is caught where commands end. Whoever knows which file or size it was says more.
  """
  text = " ".join(str(error).split())[:200]
  full = type(error).__name__ == "JaxRuntimeError" and "out of memory" in text.lower()
  if isinstance(error, MemoryError) or full:
    why = f" ({text})" if text else ""
    return InputError(f"there is not enough memory{why}; ask for less, such as a smaller batch")
  if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
    where = f"{error.filename}: " if error.filename else ""
    return InputError(
      f"{where}{error.strerror or text or type(error).__name__}; see that there is room, that you "
      "may read and write there, and that the disk answers"
    )
  return None
