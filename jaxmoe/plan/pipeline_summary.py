"""Summary of a recipe's pipeline: ticks, slots, what is in flight, the bubble; and of its rivals.

Durations are counted FLOPs of a mean stage, all stages alike; a head on the last stage is left out,
one over all devices is in `S` and `T`. Where stages keep their inputs a backward pass makes its
stage again, but for one with an `R`. Simulated, not measured.
"""

from __future__ import annotations

import dataclasses

from jaxmoe.core.errors import InputError
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.parallel import Parallel
from jaxmoe.parallel.pipelines import (
  PIPELINES,
  Columns,
  Keep,
  Table,
  Vocabulary,
  lower,
  shown,
  with_vocabulary,
)
from jaxmoe.parallel.pipelines.simulation import Durations, simulate, simulate_ticks
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.pipeline_stages import stages_of, table_of, vocabulary_of
from jaxmoe.train.spread_head import STREAM_SUMS


@dataclasses.dataclass(frozen=True)
class TableSummary:
  """A table, simulated.

  Attributes:
    pipeline: Its name.
    ticks: Of a step.
    slots: By pool, on a device.
    in_flight: Microbatches whose activations the fullest device holds at once.
    bubble: The share of devices' time without a pass, with true dependencies.
    bubble_in_ticks: That in lock-step ticks, as the engine runs.
    time, time_in_ticks: Of a step, over that of its passes on an even split without bubble.
  """

  pipeline: str
  ticks: int
  slots: dict[str, int]
  in_flight: float
  bubble: float
  bubble_in_ticks: float
  time: float
  time_in_ticks: float


@dataclasses.dataclass(frozen=True)
class PipelineSummary:
  """A recipe's pipeline.

  Attributes:
    own: Its table.
    rivals: The other tables of PIPELINES for as many devices and microbatches.
    devices: Along `pipe`.
    num_micro: Microbatches.
    stages: Layers of each stage.
    flops: By kind of pass, of a mean stage and microbatch on one device of `pipe`; of `S` and `T`
      a device's share.
    keep: What stages keep.
    slots: By what they could keep, bytes of a device's slots by pool.
    sent: Bytes of the residual stream that permutes send in a step, by direction, a device.
    summed: Bytes of it that a device sends, in rings, so that all know what a vocabulary that lies
      over all of them takes and gives.
  """

  own: TableSummary
  rivals: tuple[TableSummary, ...]
  devices: int
  num_micro: int
  stages: tuple[int, ...]
  flops: dict[str, float]
  keep: Keep
  slots: dict[Keep, dict[str, int]]
  sent: dict[str, int]
  summed: float = 0.0


def pipeline_summary(
  experiment: Experiment, vocab_size: int, stream_bytes: int,
  slots: dict[Keep, dict[str, int]] | None = None,
) -> PipelineSummary | None:  # fmt: skip
  """Returns the summary; None of a recipe without a pipeline.

  Args:
    experiment: The recipe.
    vocab_size: Of its tokenizer.
    stream_bytes: Of a microbatch's residual stream on one device.
    slots: What `slot_bytes` tells of it.

  Raises:
    InputError: The recipe's pipeline is none, or has too few microbatches or layers.
  """
  parallel, num_micro = experiment.parallel, experiment.train.num_micro
  if parallel.pipe == 1:
    return None
  table = table_of(parallel, num_micro)
  stages = stages_of(parallel, experiment.model, vocab_size)
  tokens = experiment.train.batch_size // num_micro * experiment.data.seq_len
  flops = _flops(experiment.model, experiment.data.seq_len, tokens)
  summed = 0.0
  if (vocabulary := vocabulary_of(parallel)) is not None:
    flops |= _head_flops(vocabulary, 2.0 * tokens * experiment.model.dim * vocab_size)
    ring = 2 * (parallel.pipe - 1) / parallel.pipe
    summed = num_micro * STREAM_SUMS[vocabulary.algorithm] * ring * stream_bytes
  names = [name for name in PIPELINES if name != parallel.pipeline]
  rivals = _rivals(names, parallel, num_micro, flops, vocabulary)
  own = _of_table(table, flops, parallel.keep)
  return PipelineSummary(
    own=_summary(shown(parallel.pipeline), table, flops, parallel.keep),
    rivals=tuple(rivals),
    devices=parallel.pipe,
    num_micro=num_micro,
    stages=stages.counts,
    flops={
      kind: value / (parallel.pipe if kind in ("S", "T") else len(stages.counts))
      for kind, value in own.items()
    },
    keep=parallel.keep,
    slots=slots or {},
    sent=sent_bytes(lower(table, parallel.keep), stream_bytes),
    summed=summed,
  )


def sent_bytes(columns: Columns, stream_bytes: int) -> dict[str, int]:
  """Returns what permutes send in a step, by direction: every tick, idle devices zeros."""
  sent = {"right": 0, "left": 0}
  for channel in columns.channels:
    if channel.route != "here":
      sent[channel.route] += columns.num_ticks * stream_bytes
  return sent


def _flops(model: TransformerConfig, seq_len: int, tokens: int) -> dict[str, float]:
  """Returns FLOPs by pass of all layers, of one microbatch.

  A product with weights takes as much for its output as for either gradient; what attention mixes
  with takes twice as much backward, all of it in `B`.
  """
  blocks = [block for group in model.stack for _ in range(group.repeats) for block in group.pattern]
  weights = tokens * sum(2.0 * block.active_params(model.dim) for block in blocks)
  mixing = tokens * sum(block.attention.mixing_flops(seq_len) / 3 for block in blocks)
  return {"F": weights + mixing, "B": weights + 2 * mixing, "W": weights}


def _of_table(table: Table, flops: dict[str, float], keep: Keep) -> dict[str, float]:
  """Returns FLOPs by pass of a table's layers: `B` makes a stage again that nothing was kept of."""
  again = any(part.kind == "R" for order in table.orders for one in order for part in one.parts)
  made_again = flops["F"] if keep == "input" and not again else 0.0
  backward = flops["B"] + made_again
  found = {**flops, "B": backward, "BW": backward + flops["W"]}
  return {**found, "R": flops["F"]} if again else found


def _head_flops(vocabulary: Vocabulary, product: float) -> dict[str, float]:
  """Returns FLOPs of the head's passes, of one microbatch on all devices; see `SpreadHead`."""
  if vocabulary.algorithm == 2:
    return {"S": 2 * product, "T": product}
  return {"S": product, "T": 3 * product}


def _summary(name: str, table: Table, flops: dict[str, float], keep: Keep) -> TableSummary:
  """Returns a table's summary; time is in steps of even work."""
  flops = _of_table(table, flops, keep)
  stages, devices = table.placement.num_stages, table.placement.num_devices
  of_head = {kind: flops.get(kind, 0.0) * stages / devices for kind in ("S", "T")}
  durations = Durations(
    forward=flops["F"], again=flops["F"], backward=flops["B"], weights=flops["W"],
    scores=of_head["S"], head_weights=of_head["T"],
  )  # fmt: skip
  true, ticks = simulate(table, durations), simulate_ticks(table, durations)
  columns = lower(table, keep)
  busy = sum(true.busy) / len(true.busy)
  return TableSummary(
    pipeline=name,
    ticks=columns.num_ticks,
    slots=dataclasses.asdict(columns.slots),
    in_flight=max(true.in_flight),
    bubble=true.bubble,
    bubble_in_ticks=ticks.bubble,
    time=true.time / busy,
    time_in_ticks=ticks.time / busy,
  )


def _rivals(
  names: list[str],
  parallel: Parallel,
  num_micro: int,
  flops: dict[str, float],
  vocabulary: Vocabulary | None,
) -> list[TableSummary]:
  """Returns the other tables with a head like this one's; too few microbatches are left out."""
  found = []
  for name in names:
    try:
      table = PIPELINES[name](parallel.pipe, num_micro)
    except InputError:
      continue
    table = table if vocabulary is None else with_vocabulary(table, vocabulary)
    found.append(_summary(name, table, flops, parallel.keep))
  return found
