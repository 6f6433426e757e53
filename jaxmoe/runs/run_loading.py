"""A run as it lies in a folder: its recipe, tokenizer and newest intact parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxmoe.conversion.hf_files import Origin, origin_of
from jaxmoe.core.layout import one_device
from jaxmoe.data.tokenizers import Tokenizer, load_tokenizer
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.run_store import need_store, no_checkpoint
from jaxmoe.train.train_state import ONLY, params_from_arrays, read_params
from jaxmoe.train.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class LoadedRun:
  """What uses a run needs of it.

  Attributes:
    workdir: Its folder; None for a public checkpoint in memory.
    origin: Its files beside the weights.
    data_fingerprint: Of the batches it was trained on; None where it was converted, and not trained
      since.
  """

  workdir: Workdir | None
  experiment: Experiment
  decoder: Decoder
  tokenizer: Tokenizer
  step: int
  params: Params
  origin: Origin
  data_fingerprint: str | None

  @property
  def name(self) -> str:
    """What it is called in messages."""
    return str(self.workdir.path) if self.workdir else str(self.origin.folder)


def nothing(*ignored: Any) -> None:
  """Does nothing."""


def read_run(
  workdir: Workdir,
  check: Callable[[Tokenizer], Any] = nothing,
  warn: Callable[[str], None] = nothing,
) -> LoadedRun:
  """Returns the newest intact parameters of the run in a workdir, with its tokenizer.

  Args:
    workdir: The run; it may be alive, and nothing in it is changed.
    check: Called with the run's tokenizer before anything is compiled.
    warn: Called with a line about a checkpoint that is damaged.

  Raises:
    NoRunError: there is no run, or no checkpoint yet.
    InputError: the files are not of this run.
    CheckpointError: no checkpoint is intact.
  """
  experiment = workdir.experiment()
  store = need_store(workdir)
  made_elsewhere = isinstance(experiment.data.tokenizer, TokenizerFile)
  tokenizer = load_tokenizer(workdir.tokenizer, made_elsewhere)
  check(tokenizer)
  decoder = experiment.decoder(strict=False)  # it may have been trained on other devices
  found = read_params(store, decoder, one_device(), damage_line(warn))
  if found is None:
    raise no_checkpoint(workdir)
  step, arrays, record = found
  params = params_from_arrays(decoder, arrays)
  fingerprint = None if ONLY in record else record["data"]["fingerprint"]
  origin = origin_of(workdir)
  return LoadedRun(workdir, experiment, decoder, tokenizer, step, params, origin, fingerprint)


def damage_line(warn: Callable[[str], None]) -> Callable[[int, str], None]:
  """Returns what a store calls with a step that is damaged, and why."""
  return lambda step, why: warn(f"checkpoint {step} is damaged, trying the one before: {why}")
