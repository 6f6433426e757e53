"""The errors a command line turns into one line and an exit code.

Everything else that is raised is a defect and keeps its traceback.
"""


class ToldError(Exception):
  """The base of errors that all processes of a run meet alike and tell in one line."""

  code: int


class InputError(ToldError, ValueError):
  """A user's mistake: bad flag, field, file or shape. Exit code 2, nothing written.

  The message is one line: what is wrong, where, why, and the fix.
  """

  code = 2


class NotFiniteError(ToldError, RuntimeError):
  """Steps were skipped or rolled back more often than the budget allows. Exit code 3."""

  code = 3


class CheckpointError(ToldError, RuntimeError):
  """No intact checkpoint is left, or saving failed. Exit code 4."""

  code = 4


class DropError(ToldError, RuntimeError):
  """A layer dropped a larger share of its choices than its recipe allows. Exit code 5."""

  code = 5


class PeerError(RuntimeError):
  """Another process of the run died; the same command goes on. Exit code 43."""

  code = 43
