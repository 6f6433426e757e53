"""Flags that name a run, and what is said of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jaxmoe.commands.process import jax_settings
from jaxmoe.core.errors import InputError
from jaxmoe.data.tokenizers import Tokenizer
from jaxmoe.runs.recipe_loading import PREFIX
from jaxmoe.runs.run_loading import LoadedRun, read_run
from jaxmoe.train.workdir import Workdir


def need_workdir(path: str | None) -> Workdir:
  """Returns the workdir of a command line.

  Raises:
    InputError: the flag is missing.
  """
  if not path:
    raise InputError("--workdir is missing; give the folder of the run, such as --workdir=runs/a")
  return Workdir(path)


def load_run(
  path: str | None, check: Callable[[Tokenizer], Any] = lambda tokenizer: None
) -> LoadedRun:
  """Returns the newest intact parameters of the run that a flag names, with its tokenizer.

  Args:
    path: The workdir.
    check: Called with the run's tokenizer before anything is compiled.

  Raises:
    InputError, CheckpointError: the flag is missing; or as `read_run`.
  """

  def ready(tokenizer: Tokenizer) -> None:
    check(tokenizer)
    jax_settings.set_up_jax()

  return read_run(need_workdir(path), ready, complain)


def complain(line: str) -> None:
  """Says beside the output what went wrong and is mended."""
  print(line, file=sys.stderr)


@contextlib.contextmanager
def named(flag: str) -> Iterator[None]:
  """Says of an error which flag it is about."""
  try:
    yield
  except InputError as error:
    raise InputError(f"--{flag}: {error}") from None


@contextlib.contextmanager
def as_trained() -> Iterator[None]:
  """Says of an error that advises to change the recipe that here it is what the run has."""
  try:
    yield
  except InputError as error:
    if PREFIX not in str(error):
      raise
    raise InputError(
      f"{error} (a flag of jaxmoe train; this command takes the recipe that the run has)"
    ) from None
