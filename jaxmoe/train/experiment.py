"""The record of an experiment: everything a run depends on, and nothing else."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import optax

from jaxmoe.core.backends import ChoiceLog
from jaxmoe.core.config_io import added, diff
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import Layout
from jaxmoe.core.moved import Moved
from jaxmoe.core.parallel_context import ParallelContext
from jaxmoe.core.tokens import Compare
from jaxmoe.data.mixture import Data
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.optim import Masters, Optim, freeze, frozen_masks, frozen_names, make_optimizer
from jaxmoe.optim.freeze import Masks
from jaxmoe.parallel import Parallel
from jaxmoe.train.divisibility import check_divisibility
from jaxmoe.train.kernels import MOVED, Kernels
from jaxmoe.train.pipeline_stages import placed_groups


@dataclasses.dataclass(frozen=True)
class Recovery:
  """What happens to a step that would do harm: it changes nothing and counts as skipped.

  A step does harm if its loss or gradient is not finite, or if one of them spikes: lies more than
  `spike_factor` standard deviations above the mean of the last steps that did no harm. After
  `patience` such steps in a row the run goes back to a checkpoint and on with other data, as PaLM
  did by hand (Chowdhery et al. 2022, section 5.1). A step without labels is no such step: it
  changes nothing, is compared with nothing, and ends no row of those that were skipped.

  Attributes:
    spike_window: Steps whose loss and gradient norm a new one is compared with, once there are so
      many; 0 to call nothing a spike. Each counts once, however many labels it has: where few have
      any, as in chats, batches of more rows make losses vary less.
    spike_factor: Standard deviations; one counts as at least 1% of the mean of the loss, and half
      the mean of the norm.
    patience: Skipped steps in a row after which the run goes back.
    rollback_steps: How far the checkpoint must lie before the first of them. The oldest one kept
      is taken where none is so old, and an older one where the last rollback did not help.
    skip_batches: Batches that are left out after the last one skipped; one is in flight already.
    max_rollbacks: How often a run may go back; 0 to end instead.
  """

  spike_window: int = 128
  spike_factor: float = 6.0
  patience: int = 3
  rollback_steps: int = 1
  skip_batches: int = 1
  max_rollbacks: int = 3

  def __post_init__(self) -> None:
    for name, least in (("spike_window", 0), ("patience", 1), ("rollback_steps", 0),
                        ("skip_batches", 1), ("max_rollbacks", 0)):  # fmt: skip
      if getattr(self, name) < least:
        raise InputError(f"{name} must be at least {least}: {name}={getattr(self, name)}")
    if self.spike_window == 1:
      raise InputError("spike_window=1 has no deviation; set at least 2, or 0 for no spikes")
    if self.spike_factor <= 0:
      raise InputError(f"spike_factor must be above 0: spike_factor={self.spike_factor}")


@dataclasses.dataclass(frozen=True)
class Train:
  """How long, how much at a time, and what happens on the way.

  Attributes:
    num_steps: Optimizer steps of the whole run.
    batch_size: Rows of one step, over all microbatches.
    num_micro: Microbatches a step is accumulated over; their gradients add up exactly.
    seed: Of initial parameters, data order and randomness of the forward pass.
    max_skips: Steps that may be skipped in all, see `recovery`.
    checkpoint_every: Steps between checkpoints; the last step is always saved.
    keep: Checkpoints that are kept.
    store: The kind of checkpoint that is written: 'orbax', or of one process 'npz', plain files.
    log_every: Steps between two printed lines where there is no terminal.
    stall_s: Seconds any one step, compilation, evaluation batch or save may take before the run
      is taken for stuck and ended; 0 to wait for ever.
    recovery: What is done about steps that would do harm.
  """

  num_steps: int = 1000
  batch_size: int = 8
  num_micro: int = 1
  seed: int = 0
  max_skips: int = 10
  checkpoint_every: int = 500
  keep: int = 3
  log_every: int = 50
  stall_s: float = 1800.0
  recovery: Recovery = Recovery()
  store: Literal["orbax", "npz"] = added("orbax", before="orbax")

  def __post_init__(self) -> None:
    for name in ("num_steps", "batch_size", "num_micro", "checkpoint_every", "keep", "log_every"):
      if getattr(self, name) < 1:
        raise InputError(f"{name} must be at least 1: {name}={getattr(self, name)}")
    if self.max_skips < 0 or self.stall_s < 0:
      raise InputError(
        "max_skips and stall_s must not be negative: "
        f"max_skips={self.max_skips}, stall_s={self.stall_s}"
      )
    if self.batch_size % self.num_micro:
      raise InputError(
        "batch_size must be a multiple of num_micro: "
        f"batch_size={self.batch_size}, num_micro={self.num_micro}"
      )
    if self.store not in ("orbax", "npz"):
      raise InputError(f"store must be 'orbax' or 'npz', got {self.store!r}")
    if not 0 <= self.seed < 2**32:
      raise InputError(f"seed must lie in [0, 2**32): seed={self.seed}")


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Held-out bits per byte on the way, and where each domain's tokens are routed.

  Attributes:
    every: Steps between evaluations, the last step aside; 0 for none.
    max_bytes: Bytes of each domain that are scored on the way, in whole documents (at least one);
      `jaxmoe evaluate` scores all.
    batch_size: Rows scored at a time, at most.
    rows: `fitted` to as few and as short ones as the documents need, see `row_packing.py`; `full`
      is always `batch_size` rows of the context's length.
    overall: How domains weigh in the score of all of them: by their held-out bytes, as
      `jaxmoe evaluate` has it, or by those that are scored on the way.
  """

  every: int = 500
  max_bytes: int = 50_000
  batch_size: int = 8
  rows: Literal["fitted", "full"] = added("fitted", before="full")
  overall: Literal["held_out", "scored"] = added("held_out", before="scored")

  def __post_init__(self) -> None:
    if self.every < 0 or self.max_bytes < 1 or self.batch_size < 1:
      raise InputError(
        "every must not be negative, max_bytes and batch_size must be at least 1: "
        f"{self.every}, {self.max_bytes}, {self.batch_size}"
      )


@dataclasses.dataclass(frozen=True)
class Samples:
  """Texts written at fixed prompts on the way, into samples.md.

  Attributes:
    every: Steps between samples, the untrained model and the last step aside; 0 for none.
    prompts: What the model continues.
    max_tokens: Length of a continuation.
    temperature: 0 takes the likeliest token.
    top_p: Share of probability that is sampled from (Holtzman et al. 2020).
  """

  every: int = 500
  prompts: tuple[str, ...] = ("def ",)
  max_tokens: int = 64
  temperature: float = 0.7
  top_p: float = 0.9

  def __post_init__(self) -> None:
    if self.every < 0 or self.max_tokens < 1 or self.temperature < 0:
      raise InputError(
        "every and temperature must not be negative, max_tokens must be at least 1: "
        f"{self.every}, {self.temperature}, {self.max_tokens}"
      )
    if not 0 < self.top_p <= 1:
      raise InputError(f"top_p must lie in (0, 1]: top_p={self.top_p}")
    if not all(self.prompts):
      raise InputError("a prompt must not be empty")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One run: data, model, optimizer, training, devices, what is looked at on the way."""

  data: Data
  model: TransformerConfig = TransformerConfig()
  optim: Optim = Optim()
  train: Train = Train()
  parallel: Parallel = Parallel()
  evaluation: Evaluation = Evaluation()
  samples: Samples = Samples()
  kernels: Kernels = added(Kernels(), before=Kernels())

  moved: ClassVar[tuple[Moved, ...]] = MOVED

  def __post_init__(self) -> None:
    train, length = self.train, self.data.seq_len
    check_divisibility(self.parallel, self.model, train.batch_size, train.num_micro, length)
    if not self.optim.fairness.weight:
      return
    if len(self.data.parts) < 2:
      raise InputError(
        "optim.fairness compares the domains of the data, and there is one: "
        f"parts={len(self.data.parts)}; add a part, or set optim.fairness.weight=0"
      )
    if not self.decoder().tree_paths:
      raise InputError(
        "optim.fairness compares the decisions of gates that are trees, and no router has one; use "
        "the router tree, or set optim.fairness.weight=0"
      )

  @property
  def compare(self) -> Compare | None:
    """What is compared between domains, None for nothing."""
    fairness = self.optim.fairness
    return Compare(len(self.data.parts), fairness.target) if fairness.weight else None

  def decoder(
    self, layout: Layout | None = None, strict: bool = True, log: ChoiceLog | None = None
  ) -> Decoder:
    """Returns the functions of the model; its vocabulary is the tokenizer's.

    Args:
      layout: Of the devices that programs of it are for, over whose stages layers then lie; None
        for those of this process, with layers in order.
      strict: Whether back ends that are asked for and do not fit are refused; else `auto`.
      log: Where choices of back ends are told.
    """
    parallel = ParallelContext(chooser=self.kernels.chooser(layout, strict, log))
    size = self.data.tokenizer.vocab_size
    groups = None if layout is None else placed_groups(self.parallel, self.model, size)
    return Decoder(self.model, size, parallel, groups)

  def frozen(self, decoder: Decoder) -> Masks:
    """Returns which entries of the decoder's parameters do not move.

    Raises:
      InputError: a pattern names nothing.
    """
    return frozen_masks(self.optim.frozen, decoder.shapes, decoder.dims, decoder.layer_groups)

  def masters(self, decoder: Decoder) -> Masters:
    """Returns in which dtypes the decoder's parameters train.

    Raises:
      InputError: a pattern of `frozen` names nothing.
    """
    return Masters(
      self.optim.master_dtype, frozen_names(self.frozen(decoder), decoder.layer_groups)
    )

  def transform(self, decoder: Decoder) -> optax.GradientTransformation:
    """Returns the optimizer of a run over the decoder's parameters.

    Raises:
      InputError: the schedule does not fit, a pattern of `frozen` names nothing, or the optimizer
        cannot treat a parameter.
    """
    frozen = self.frozen(decoder)
    steps = self.train.num_steps
    optimizer = freeze(
      make_optimizer(self.optim, steps, decoder.parameter_names, decoder.dims), frozen
    )
    if self.compare is None:
      return optimizer
    # Outside of what is frozen, whose gradient counts for nothing.
    fairness = self.optim.fairness.transform(decoder.tree_paths, self.compare.num_domains)
    return optax.chain(fairness, optimizer)


SAFE_TO_CHANGE = (
  "train.num_steps",
  "train.max_skips",
  "train.checkpoint_every",
  "train.keep",
  "train.log_every",
  "train.stall_s",
  "train.recovery.max_rollbacks",
  "optim.schedule.earlier_ends*",  # after the dot each of them has a path of its own
  "data.allow_broken_files",
  "data.cache_bytes",
  "data.worker",
  "parallel.*",
  "evaluation.*",
  "samples.*",
  "kernels.*",
)
"""Fields that may differ when a run goes on: they change no number already written."""


def unsafe_changes(old: Experiment, new: Experiment) -> dict[str, tuple[Any, Any]]:
  """Returns the differences that forbid `new` to go on with a run of `old`."""
  return {path: pair for path, pair in diff(old, new).items() if not _matches(path, SAFE_TO_CHANGE)}


def _matches(path: str, patterns: Iterable[str]) -> bool:
  return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
