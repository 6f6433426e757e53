"""The errors a command line turns into one line and an exit code.

Everything else that is raised is a defect and keeps its traceback.
"""


class InputError(ValueError):
  """A user's mistake: bad flag, field, file or shape. Exit code 2, nothing written.

  The message is one line: what is wrong, where, why, and the fix.
  """


class NotFiniteError(RuntimeError):
  """Loss or gradients were not finite more often than the budget allows. Exit code 3."""


class CheckpointError(RuntimeError):
  """No intact checkpoint is left, or saving failed. Exit code 4."""
