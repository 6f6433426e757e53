"""Advice for rows over context devices: strategies by kind of attention, the choice and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.cost.links import LinkProfile
from jaxmoe.models.binary_linear_attention import BinaryLinear
from jaxmoe.models.latent_attention import LatentAttention
from jaxmoe.plan.context_times import AttentionWork, StrategyTime, choice_text, context_times
from jaxmoe.train.context_rules import check_context
from jaxmoe.train.experiment import Experiment

MAX_ROWS = 16
"""Rows over which times are a mean; drawn lengths differ little beyond."""


@dataclasses.dataclass(frozen=True)
class ContextSummary:
  """One kind of attention of a recipe.

  Attributes:
    attention: Its class.
    layers: How many layers have it.
    context: Devices.
    rows: Rows that times are a mean of.
    flops_per_s: What a device was taken to do.
    times: Of all strategies, the least first.
    choice: Which and why, a line.
  """

  attention: str
  layers: int
  context: int
  rows: int
  flops_per_s: float
  times: tuple[StrategyTime, ...]
  choice: str


def context_summary(
  experiment: Experiment,
  links: LinkProfile,
  lengths: np.ndarray | None,
  flops_per_s: float,
) -> tuple[ContextSummary, ...]:
  """Returns the advice for each kind of attention; linear attention hands its state on, no choice.

  Pairs are those of causal attention within documents; windows, which see fewer, are not counted.

  Args:
    experiment: A recipe with `parallel.context` above 1.
    links: Between its context devices.
    lengths: Of documents, packed to rows one after the other; None: a row is one document.
    flops_per_s: What a device does.

  Raises:
    InputError: There is one context device, or the links are of other devices.
  """
  context, length = experiment.parallel.context, experiment.data.seq_len
  if context == 1:
    raise InputError(
      "a link profile is for rows that are spread over devices, and parallel.context=1; set "
      "parallel.context above 1"
    )
  rows = rows_of_lengths(lengths, length) if lengths is not None else [np.ones(length, np.int32)]
  counts: dict[Any, int] = {}
  for group in experiment.model.stack:
    for block in group.pattern:
      heads = getattr(block.attention, "heads", block.attention)
      counts[heads] = counts.get(heads, 0) + group.repeats

  def rule(attend: str, order: str) -> str | None:
    asked: dict[str, Any] = {"attend": attend, "order": order}
    parallel = dataclasses.replace(experiment.parallel, **asked)
    try:
      check_context(parallel, experiment.model, length)
    except InputError as error:
      return str(error)
    return None

  itemsize = np.dtype(str(experiment.model.dtype).replace("bfloat16", "float16")).itemsize
  found = []
  for heads, layers in counts.items():
    if not isinstance(heads, BinaryLinear):
      work = attention_work(heads, itemsize, flops_per_s)
      times = context_times(rows, context, work, links, rule)
      found.append(
        ContextSummary(
          type(heads).__name__, layers, context, len(rows), flops_per_s, times, choice_text(times)
        )
      )
  return tuple(found)


def attention_work(attention: Any, itemsize: int, flops_per_s: float) -> AttentionWork:
  """Returns what a kind of attention computes and sends; latents are sent as they are."""
  heads = attention.num_heads
  if isinstance(attention, LatentAttention):
    sent = attention.latent_dim + attention.rope_dim
    query, keys, value, kept = sent, sent, attention.latent_dim, 1
  else:
    query = value = attention.head_dim
    kept = attention.num_kv_heads
    keys = 2 * kept * value
  return AttentionWork(
    query_heads=heads,
    key_heads=kept,
    query_bytes=heads * query * itemsize,
    key_bytes=keys * itemsize,
    found_bytes=heads * (value * itemsize + 4.0),
    flops_per_pair=attention.mixing_flops(1) / 3,
    flops_per_s=flops_per_s,
    gradient_bytes=4 / itemsize,
  )


def rows_of_lengths(lengths: Sequence[int] | np.ndarray, seq_len: int) -> list[np.ndarray]:
  """Returns the first rows of documents packed one after the other; a cut one goes on in the next.

  Lengths that do not fill a row are followed by padding.
  """
  total = min(int(np.sum(lengths)), MAX_ROWS * seq_len)
  document = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[:total]
  padded = np.zeros(-(-total // seq_len) * seq_len, np.int32)
  padded[:total] = document
  rows = padded.reshape(-1, seq_len)
  return [row[:] for row in (rows if total < seq_len else rows[: total // seq_len])]


def read_lengths(path: str) -> np.ndarray:
  """Returns the document lengths of an .npy file.

  Raises:
    InputError: No plain .npy of positive integers; one line.
  """
  try:
    with open(path, "rb") as file:
      lengths = np.load(file, allow_pickle=False)
  except Exception as error:  # NumPy raises whatever its parsers raise
    raise InputError(
      f"--lengths={path} is no plain .npy file ({error}); write one with np.save, without pickle"
    ) from None
  good = isinstance(lengths, np.ndarray) and lengths.ndim == 1 and lengths.dtype.kind in "iu"
  if not good or not len(lengths) or lengths.min() < 1:
    raise InputError(f"--lengths={path} must be whole numbers above 0, one a document, in one dim")
  return lengths.astype(np.int64)
