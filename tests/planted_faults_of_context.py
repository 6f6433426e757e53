"""Faults planted in rows that are spread over context devices; see `tests/planted_faults.py`."""

import dataclasses
import importlib
from typing import Any

import jax.numpy as jnp

from jaxmoe.core.tokens import Tokens
from jaxmoe.models import attention, binary_linear_attention, stick_breaking_attention
from jaxmoe.models.cache import NoCache
from jaxmoe.parallel import MeshContext, Parallel, layouts, mesh_context
from jaxmoe.parallel.attend.context_group import ContextGroup
from jaxmoe.parity import Cell

merging = importlib.import_module("jaxmoe.ops.attention.merge")  # a function has its name
GATHER, RING = Cell(Parallel(context=4)), Cell(Parallel(context=4, attend="ring"))
TOKEN_RING = Cell(Parallel(context=2, attend="token_ring"))
TWO = Cell(Parallel(context=2, attend="ring"))
ZIGZAG = Cell(Parallel(context=4, attend="ring", order="zigzag"))


def lse_without_peak(original: Any) -> Any:
  """Log-sum-exps of parts merged as if the largest score were 0."""

  def of_two(one: Any, other: Any) -> Any:
    lse, (first, second) = original(one, other)
    return lse - largest(one, other), (first, second)

  return of_two


def largest(one: Any, other: Any) -> Any:
  """Returns the larger of two, 0 where neither is finite."""
  peak = jnp.maximum(one, other)
  return jnp.where(jnp.isfinite(peak), peak, 0)


def labels_in_time(original: Any) -> Any:
  """Labels that stay in order of time while ids move."""

  def order(batch: Any, **how: Any) -> Any:
    return {**original(batch, **how), "labels": batch["labels"]}

  return order


def slots_of_part(original: Any) -> Any:
  """Slots that begin at 0 on every device."""

  def spread(tokens: Any, *how: Any) -> Any:
    return dataclasses.replace(original(tokens, *how), slot=tokens.slot)

  return spread


def noise_of_part(original: Any) -> Any:
  """Noise drawn for a device's tokens as if they were whole rows."""
  return lambda self, *what: original(dataclasses.replace(self, rows=None), *what)


FAULTS_OF_CONTEXT = {
  "a hop too few": (TWO, ContextGroup, "hops", lambda of: lambda *args: of(*args) - 1),
  "queries come a hop too few": (
    TOKEN_RING, ContextGroup, "hops", lambda of: lambda *args: of(*args) - 1
  ),
  "keys go round the other way": (
    RING, ContextGroup, "shift", lambda of: lambda self, tree, by: of(self, tree, -by)
  ),
  "a log-sum-exp without its maximum": (RING, merging, "_sum", lse_without_peak),
  "a sink joins in more than one part": (
    dataclasses.replace(RING, attention="sinks"), attention, "join_sink",
    lambda of: lambda part, sink: of(of(part, sink), sink),
  ),
  "farther keys take their share first": (
    dataclasses.replace(RING, attention="stick_breaking"), stick_breaking_attention, "STICK_PARTS",
    lambda of: dataclasses.replace(of, merge=lambda near, far: of.merge(far, near)),
  ),
  "labels are not ordered with ids": (ZIGZAG, layouts, "order_batch", labels_in_time),
  "sums by row are of a part": (RING, MeshContext, "psum_context", lambda _: lambda self, x: x),
  "rotary length is that of a part": (
    dataclasses.replace(RING, attention="qk_norm"), NoCache, "max_length",
    lambda _: lambda self, tokens: tokens.slot.shape[1],
  ),
  "slots are those of a part": (GATHER, mesh_context, "spread_rows", slots_of_part),
  "noise is drawn for a part": (
    dataclasses.replace(TWO, router="noisy"),
    Tokens, "draw", noise_of_part,
  ),
  "a state is not handed on": (
    dataclasses.replace(GATHER, attention="binary_linear"), binary_linear_attention, "_handed_on",
    lambda _: lambda empty, *_: empty,
  ),
}  # fmt: skip
"""By name: the cell, the owner, what is replaced there, and from the original to the fault."""
