"""A step of a pipeline on one device: what its passes read, and what traces of stages find."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Compare, Tokens
from jaxmoe.models.loss_pieces import LossPieces
from jaxmoe.models.transformer import Params
from jaxmoe.moe.balance import StepTotals
from jaxmoe.parallel.tick_scan import Row
from jaxmoe.train.deferred_weights import DeferredWeights, FlatSlot, find_deferred
from jaxmoe.train.gradients import Batch
from jaxmoe.train.kept_residuals import KeptResiduals
from jaxmoe.train.stage_program import StageInputs, StageProgram, StageShape

FIRST: Any = {"stage": np.int32(0), "micro": np.int32(0)}
"""Where some pass is, for its shapes."""


@dataclasses.dataclass(frozen=True)
class PipelineStep:
  """Parameters and rows of this device, what is known of the step, and what is found by tracing.

  Attributes:
    pieces: Of the model's loss.
    depth_PN: Of the first layer of each stage, by device and place.
    axis: The mesh axis of the stages.
    params: As they are stored.
    micro: The batch by microbatch.
    keys: Of the forward pass.
    totals: Of the step; `running` is of no microbatch.
    compare: What is compared between domains.
    deferred: Of each stage, the weights whose gradients are put off.
    kept: Of each stage, its passes that keep residuals.
  """

  pieces: LossPieces
  depth_PN: np.ndarray
  axis: str
  params: Params
  micro: Batch
  keys: Keys
  totals: StepTotals
  compare: Compare | None = None
  deferred: Mapping[StageShape, DeferredWeights] = dataclasses.field(default_factory=dict)
  kept: Mapping[StageShape, KeptResiduals] = dataclasses.field(default_factory=dict)

  def parameters(self, shape: StageShape) -> tuple[list[Params], Params]:
    """Returns what a stage reads: the leaves of its layers, and parameters beside them."""
    tied = self.pieces.decoder.config.tied
    return shape.weights(self.params), shape.outer(self.params, tied)

  def given(self, where: Row, running: Any) -> StageInputs:
    """Returns what a stage is given in a pass.

    Args:
      where: The `stage`, by its place on the device, and the `micro`.
      running: The sums of routers over earlier microbatches.
    """
    micro, decoder = where["micro"], self.pieces.decoder
    tokens, labels_BL = self.tokens(micro)
    here = decoder.parallel.row_group() * self.totals.num_micro + micro
    totals = dataclasses.replace(self.totals, running=running)
    depth = jnp.asarray(self.depth_PN)[jax.lax.axis_index(self.axis), where["stage"]]
    return StageInputs(depth, tokens, labels_BL, self.keys.at(here), totals)

  def tokens(self, micro: jax.Array | np.int32) -> tuple[Tokens, jax.Array]:
    """Returns what is known of a microbatch's tokens, and their labels."""
    batch = jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, micro, keepdims=False), self.micro
    )
    tokens = self.pieces.decoder.parallel.spread_rows(Tokens.of_batch(batch))
    if self.compare is not None:
      tokens = dataclasses.replace(tokens, domain=batch["domain"], compare=self.compare)
    return tokens, batch["labels"]

  def message(self) -> Any:
    """Returns the shapes of what a stage hands the next one."""

    def embedded() -> Any:
      ready = self.pieces.decoder.parallel.gather_params({"embed": self.params["embed"]})
      return self.pieces.embed(ready, self.given(FIRST, None).tokens)

    return jax.eval_shape(embedded)

  def found_of(self, shape: StageShape) -> Any:
    """Returns the shapes of a stage's metrics and reports."""

    def found(handed: Any) -> Any:
      given = self.given(FIRST, self.totals.running)
      return StageProgram(self.pieces, shape).loss(*self.parameters(shape), handed, given)[1]

    return jax.eval_shape(found, self.message())

  def deferred_of(self, shape: StageShape) -> DeferredWeights:
    """Returns which weights' gradients a stage puts off, by traces."""
    (weights, outer), handed = self.parameters(shape), self.message()
    stage, parallel = StageProgram(self.pieces, shape), self.pieces.decoder.parallel

    def trace(weights: list[Params]) -> Any:
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), handed)
      return stage.loss(weights, outer, zeros, self.given(FIRST, self.totals.running))[0]

    gathers = [functools.partial(parallel.gather_layer, run.group) for run in shape.runs]
    return find_deferred(trace, weights, gathers)

  def deferred_slot(self) -> FlatSlot:
    """Returns the slots of what gradients of weights that are put off are made of."""
    return FlatSlot.of([
      jax.eval_shape(lambda of=of, shape=shape: of.taps(shape.weights(self.params)))
      for shape, of in self.deferred.items()
    ])  # fmt: skip

  def kept_slot(self) -> FlatSlot:
    """Returns the slots of residuals; the last stage's have the gradient of its output, too."""
    return FlatSlot.of([
      [of.shapes, *([self.message()[0]] * shape.last)] for shape, of in self.kept.items()
    ])  # fmt: skip

  def kept_of(self, shape: StageShape) -> KeptResiduals:
    """Returns the passes of a stage that keep residuals, by a trace; without the head."""
    stage, off = StageProgram(self.pieces, shape.without_head), self.deferred.get(shape)

    def loss(parameters: Any, where: Row, handed: Any, running: Any) -> Any:
      weights, outer, taps = parameters
      of_layers = off.tapped(off.kept_off(weights), taps) if off else weights
      return stage.loss(of_layers, outer, handed, self.given(where, running))

    return KeptResiduals.of(
      loss, self.tapped_parameters(shape), FIRST, self.message(), self.totals.running
    )

  def tapped_parameters(self, shape: StageShape) -> tuple[list[Params], Params, Any]:
    """Returns what a stage without a head reads, and taps where gradients are put off."""
    weights, outer = self.parameters(shape.without_head)
    off = self.deferred.get(shape)
    return weights, outer, off.taps(weights) if off else []


def half_of(row: Row, half: str) -> Row:
  """Returns where the forward (f) or backward (b) half of a pass is."""
  return {"stage": row[f"{half}_stage"], "micro": row[f"{half}_micro"]}
