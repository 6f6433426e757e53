"""The parts of a run that live as long as it trains, for whoever needs several of them."""

from __future__ import annotations

import dataclasses

from jaxmoe.checkpoint import Store
from jaxmoe.core import multihost
from jaxmoe.core.errors import CheckpointError
from jaxmoe.data.corpus import Corpus
from jaxmoe.data.stream import BatchStream
from jaxmoe.train.append_file import AppendFile
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.hooks import cut_samples
from jaxmoe.train.observers import Observers
from jaxmoe.train.run_log import CutLines
from jaxmoe.train.train_state import StateSpec


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a run works with.

  Attributes:
    experiment: Its recipe.
    corpus: Its documents.
    spec: Shapes and names of its state.
    store: Where checkpoints go.
    stream: Where batches come from.
    observers: Who looks on.
    samples: samples.md.
  """

  experiment: Experiment
  corpus: Corpus
  spec: StateSpec
  store: Store
  stream: BatchStream
  observers: Observers
  samples: AppendFile

  def forget(self, step: int) -> CutLines:
    """Cuts off what was written of steps after `step`, and returns the lines that went.

    Raises:
      CheckpointError: the disk refuses to change the files.
    """
    with multihost.raise_on_all():
      return self._forget(step) if multihost.is_main_process() else CutLines()

  def _forget(self, step: int) -> CutLines:
    try:
      cut = self.observers.log.resume(step)
      self.samples.flush()
      cut_samples(self.samples.path, step)
    except OSError as error:
      raise CheckpointError(f"cannot cut the files of the run to step {step}: {error}") from error
    return cut
