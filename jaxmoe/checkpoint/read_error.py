"""Errors of reading a checkpoint: damage, or a reason that may pass."""

import errno
import pathlib
from collections.abc import Iterator

from jaxmoe.checkpoint.manifest import DamagedStepError
from jaxmoe.core.errors import CheckpointError

# What says nothing about the files themselves, and must not set a good step aside.
_PASSING_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM}
_PASSING_STATUS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


def read_error(path: pathlib.Path, error: Exception) -> CheckpointError:
  """Returns the error that says a file is damaged, unless reading failed for what may pass."""
  kind = CheckpointError if any(map(_may_pass, _causes(error))) else DamagedStepError
  return kind(f"{path}: cannot be read: {one_line(error)}")


def one_line(error: Exception) -> str:
  """Returns what an exception says, on one line that is not too long.

  Orbax wraps what TensorStore raised in a bare `Exception` about an object, a page long; the cause
  says what is wrong.
  """
  cause = next((each for each in _causes(error) if type(each) is not Exception), error)
  text = " ".join(f"{type(cause).__name__}: {cause}".split())
  return text if len(text) <= 300 else text[:297] + "..."


def _may_pass(error: BaseException) -> bool:
  """Whether an error says nothing about the files themselves."""
  if isinstance(error, OSError) and error.errno in _PASSING_ERRNOS:
    return True
  return isinstance(error, MemoryError) or any(word in str(error) for word in _PASSING_STATUS)


def _causes(error: BaseException) -> Iterator[BaseException]:
  """Yields an exception and what it was raised from, and so on."""
  cause: BaseException | None = error
  while cause is not None:
    yield cause
    cause = cause.__cause__
