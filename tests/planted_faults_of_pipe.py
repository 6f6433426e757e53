"""Faults planted in stages of a pipeline; see `tests/planted_faults.py`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.parallel import MeshContext, Parallel, ReduceScatter, tick_scan
from jaxmoe.parallel.pipelines import lowering
from jaxmoe.parity import Cell
from jaxmoe.parity.cells import AGAIN
from jaxmoe.train import pipeline_gradients
from jaxmoe.train.pipeline_gradients import PipelineGradients
from jaxmoe.train.pipeline_step import PipelineStep
from jaxmoe.train.spread_head import SpreadHead
from jaxmoe.train.stage_program import StageShape

STAGES = Cell(Parallel(pipe=2))
HANDING_ON = dataclasses.replace(STAGES, router="residual")
RING = Cell(Parallel(context=2, pipe=2, attend="ring"))
LATE = Cell(Parallel(pipe=2, pipeline="zb_h1"))
KEPT = Cell(Parallel(pipe=2, keep="residuals"))
MADE_AGAIN = Cell(Parallel(pipe=2, pipeline=AGAIN))
SPREAD = Cell(Parallel(pipe=2, head="one_barrier"))


def without_carry(original: Any) -> Any:
  """Messages whose second part, what gates hand on, stays behind."""

  def moved(sent: Any, *how: Any) -> Any:
    stream, carry = original(sent, *how)
    return stream, jax.tree.map(jnp.zeros_like, carry)

  return moved


def freed_early(original: Any) -> Any:
  """Slots that may be written a tick before they are read for the last time."""

  def assign(stays: Any) -> Any:
    early = [
      dataclasses.replace(stay, last_read=max(stay.last_read - 1, stay.written)) for stay in stays
    ]
    return original(early)

  return assign


def kept_where_empty(original: Any) -> Any:
  """Gradients of a stage's last layer, added to the last place of its device, too."""

  def put(self: Any, run: Any, stack: Any, found: Any) -> Any:
    stack = original(self, run, stack, found)
    more = jax.tree.map(
      lambda all_of, leaf: all_of.at[-1].add(leaf[-1] * (all_of.shape[0] > leaf.shape[0])),
      {place: stack[run.group][place] for place in found}, found,
    )  # fmt: skip
    return {**stack, run.group: {**stack[run.group], **more}}

  return put


def embedding_twice(original: Any) -> Any:
  """The embedding's gradient, counted once for each stage."""

  def finalize(self: Any, grads: Any) -> Any:
    found = original(self, grads)
    return {**found, "embed": jax.tree.map(lambda leaf: 2 * leaf, found["embed"])}

  return finalize


def mean_of_means(original: Any) -> Any:
  """Losses that are means over a microbatch's labels; the step's is the mean of these."""

  def given(self: Any, *where: Any) -> Any:
    found = original(self, *where)
    labels = jnp.sum(found.labels_BL >= 0).astype(jnp.float32)
    mine = self.pieces.decoder.parallel.psum_tokens(labels)
    labels = jnp.maximum(self.totals.num_micro * mine, 1)
    return dataclasses.replace(found, totals=dataclasses.replace(found.totals, labels=labels))

  return given


def unembedded_twice(original: Any) -> Any:
  """The gradient of a spread embedding, counted once for each stage."""

  def unembed(self: Any, *given: Any) -> Any:
    return jax.tree.map(lambda leaf: 2 * leaf, original(self, *given))

  return unembed


def after_the_step(original: Any) -> Any:
  """Head passes of which that of the first microbatch comes too late for the step's gradient."""

  def backward(self: Any, head: Any, step: Any, row: Any, taken: Any, state: Any) -> Any:
    made = original(self, head, step, row, taken, state)
    grads = jax.tree.map(
      lambda before, after: jnp.where(row["b_micro"] == 0, before, after),
      state.grads, made.state.grads,
    )  # fmt: skip
    return made._replace(state=dataclasses.replace(made.state, grads=grads))

  return backward


def kept_once(original: Any) -> Any:
  """Residuals of the first microbatch; of others zeros."""

  def keep(self: Any, stage: Any, step: Any, row: Any, taken: Any, state: Any) -> Any:
    *made, kept = original(self, stage, step, row, taken, state)
    first = row["f_micro"] == 0
    return *made, jax.tree.map(lambda of: jnp.where(first, of, jnp.zeros_like(of)), kept)

  return keep


def all_of_a_loss(original: Any) -> Any:
  """A loss that all devices find, whole in each one's share."""

  def loss(self: Any, *given: Any) -> Any:
    share, nll = original(self, *given)
    return share * self.share, nll

  return loss


FAULTS_OF_PIPE = {
  "a carry is not sent": (HANDING_ON, tick_scan, "_moved", without_carry),
  "messages go the other way": (
    Cell(Parallel(pipe=4)), tick_scan, "_moved",
    lambda of: lambda sent, axis, route, size: of(
      sent, axis, {"right": "left", "left": "right"}.get(route, route), size
    ),
  ),
  "one slot for all messages": (
    STAGES, tick_scan, "read_slot", lambda of: lambda pool, slot: of(pool, 0 * slot)
  ),
  "a slot is freed a tick early": (STAGES, lowering, "assign_slots", freed_early),
  "a slot of residuals is freed a tick early": (KEPT, lowering, "assign_slots", freed_early),
  "residuals meet the tokens of another microbatch": (
    KEPT, pipeline_gradients, "half_of", lambda of: lambda row, half: of(row, "f")
  ),
  "what is made again is kept of one microbatch alone": (
    MADE_AGAIN, PipelineGradients, "_keep", kept_once
  ),
  "a gradient that was put off is dropped": (
    LATE, PipelineGradients, "_weights", lambda _: lambda self, stage, step, row, state: state
  ),
  "an embedding's gradient is counted by stage": (
    STAGES, ReduceScatter, "finalize", embedding_twice
  ),
  "a step's loss is the mean of its microbatches' means": (
    STAGES, PipelineStep, "given", mean_of_means
  ),
  "a permute stands in a branch": (
    RING, MeshContext, "_context_group",
    lambda of: property(lambda self: of.fget(self)._replace(permutes=True)),
  ),
  "an empty place keeps a gradient": (STAGES, StageShape, "put", kept_where_empty),
  "an embedding's gradient is counted by device": (SPREAD, SpreadHead, "unembed", unembedded_twice),
  "a gradient of the head comes after the step": (
    SPREAD, PipelineGradients, "_head_backward", after_the_step
  ),
  "a head's loss is counted by device": (SPREAD, SpreadHead, "loss", all_of_a_loss),
}  # fmt: skip
"""By name: the cell, and where what stands in the place of what."""
