"""The gradient of a step's loss over the stages of a pipeline: what `make_gradients` gives.

Every device runs the passes of its columns (`parallel/pipelines`) over its own stages' layers and
adds up their gradients and metrics, as accumulation over microbatches does; `parallel/tick_scan.py`
moves what stages hand each other. A forward pass keeps its stage's input, from which the backward
pass makes the stage again, or an `R` before it; or it keeps residuals, and nothing is made again.
What a stage finds of metrics counts once, where its loss is made: with its residuals, or in its
backward pass. What lies on all stages, the embedding and the head, has its gradient on those that
use it; the reducer sums over devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Compare
from jaxmoe.models.loss_pieces import LossPieces
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.parallel.pipelines import (
  KINDS,
  Columns,
  Keep,
  Table,
  Vocabulary,
  forward_only,
  lower,
  with_vocabulary,
)
from jaxmoe.parallel.stages import Stages
from jaxmoe.parallel.tick_scan import (
  Pass,
  PassResult,
  Row,
  VocabularyEnds,
  empty_slots,
  read_slot,
  scan_ticks,
  write_slot,
)
from jaxmoe.train.deferred_weights import RunTaps
from jaxmoe.train.gradients import (
  Batch,
  GradientReducer,
  Metrics,
  Statistics,
  balance_corrections,
  counts_first,
  router_sums,
)
from jaxmoe.train.pipeline_state import PipelineState, empty_state, local_zero_sums
from jaxmoe.train.pipeline_step import PipelineStep, half_of
from jaxmoe.train.spread_head import SpreadHead
from jaxmoe.train.stage_program import StageProgram, StageShape


class Halves(NamedTuple):
  """What the branches of passes differ by, beside their kind.

  Attributes:
    ahead: The stage of a pass's forward half.
    back: That of its backward half.
    makes: Whether the forward half keeps residuals.
    takes: Whether the backward half takes them.
  """

  ahead: StageShape | None = None
  back: StageShape | None = None
  makes: bool = False
  takes: bool = False


class PipelineGradients:
  """The function from parameters, batch and keys to gradient, metrics and statistics.

  For use inside `shard_map`, with the parameters of this device's layers; see `make_gradients`.
  Sums of layers in the metrics, and statistics, are those of this device's rows.

  Args:
    decoder: The model in the context of a device, its layers placed by `stages`.
    table: What devices do.
    stages: Which layers each stage has.
    axis: The mesh axis of the stages.
    reducer: The reduction of gradients over devices.
    compare: What is compared between domains.
    keep: What a forward pass keeps for the backward pass of its stage.
  """

  def __init__(
    self, decoder: Decoder, table: Table, stages: Stages, axis: str, reducer: GradientReducer,
    compare: Compare | None = None, keep: Keep = "input",
  ):  # fmt: skip
    self.decoder, self.axis, self.reducer, self.compare = decoder, axis, reducer, compare
    self.pieces, self.num_micro = LossPieces(decoder), table.num_micro
    self.columns = lower(table, keep)
    forward = forward_only(table.placement, table.num_micro)
    self.head = None
    if table.vocabulary is not None:
      last = table.placement.device_of[-1]
      share = decoder.parallel.tensor_size * table.placement.num_devices
      self.head = SpreadHead(self.pieces, table.vocabulary, axis, last, share)
      forward = with_vocabulary(forward, Vocabulary())  # which has no T to wait for
    self._counting = lower(forward)
    self.count_first = counts_first(decoder, table.num_micro)
    depths = [[stages.bounds(stage)[0] for stage in row] for row in self.columns.stages_PN]
    self._depth_PN = np.array(depths, np.int32)
    self._over_stages = functools.partial(jax.lax.psum, axis_name=axis)
    self._shape_of = [
      StageShape.of(stages, stage, decoder.layer_groups) for stage in range(len(stages.counts))
    ]

  def __call__(
    self, params: Params, batch: Batch, keys: Keys
  ) -> tuple[Params, Metrics, Statistics]:
    """Returns the gradient as the reducer makes it, metrics and statistics."""
    step, parallel = self.step_of(params, batch, keys), self.decoder.parallel
    state = self._scan(
      self.columns, step, self._gradient_pass, self._empty(step), self._ends(step, grads=True)
    )
    metrics = {**self._over_stages(parallel.psum_tokens(state.metrics)), "layers": state.layers}
    corrections = balance_corrections(self.decoder, metrics, self.count_first, self._over_stages)
    metrics = {**metrics, "tokens": step.totals.tokens, **corrections}
    return self.reducer.finalize(state.grads), metrics, state.joined_statistics()

  def step_of(self, params: Params, batch: Batch, keys: Keys) -> PipelineStep:
    """Returns what passes read, with what traces of this pipeline's stages find."""
    totals = self.pieces.totals(batch["segment"] > 0, batch["labels"], self.num_micro)
    micro = jax.tree.map(lambda x: x.reshape(self.num_micro, -1, *x.shape[1:]), batch)
    zeros = local_zero_sums(self.decoder, params)
    step = PipelineStep(
      self.pieces, self._depth_PN, self.axis, params, micro, keys,
      dataclasses.replace(totals, running=zeros), self.compare,
    )  # fmt: skip
    if self.count_first:
      whole = self._count(step, zeros)
      step = dataclasses.replace(step, totals=dataclasses.replace(step.totals, whole=whole))
    shapes, slots = list(dict.fromkeys(self._shape_of)), self.columns.slots
    off = {shape: step.deferred_of(shape) for shape in shapes if slots.deferred}
    step = dataclasses.replace(step, deferred=off)
    kept = {shape: step.kept_of(shape) for shape in shapes if slots.kept}
    return dataclasses.replace(step, kept=kept)

  def _scan(
    self, columns: Columns, step: PipelineStep,
    make: Callable[[str, Halves, PipelineStep], Pass], state: Any, ends: VocabularyEnds | None,
  ) -> Any:  # fmt: skip
    """Returns the state after all ticks of these columns, whose passes `make` makes."""
    found: dict[tuple[str, Halves], int] = {("idle", Halves()): 0}
    passes: list[tuple[str, Pass]] = [("idle", lambda row, taken, state: PassResult(state))]
    which_PK = np.zeros(columns.kind.shape, np.int32)
    for (device, tick), code in np.ndenumerate(columns.kind):
      ahead, back = (
        self._shape_of[columns.stages_PN[device, slot]] if slot >= 0 else None
        for slot in (columns.f_stage[device, tick], columns.b_stage[device, tick])
      )
      keeps = (columns.f_kept[device, tick] >= 0, columns.b_kept[device, tick] >= 0)
      key = KINDS[code], Halves(ahead, back, *map(bool, keeps))
      if key not in found:
        found[key] = len(passes)
        passes.append((key[0], make(*key, step)))
      which_PK[device, tick] = found[key]
    kept = step.kept_slot().shapes() if columns.slots.kept else None
    return scan_ticks(columns, self.axis, passes, which_PK, step.message(), state, ends, kept)

  def _ends(self, step: PipelineStep, grads: bool) -> VocabularyEnds | None:
    """Returns what all devices do with the embedding where it lies over all of them."""
    if (head := self.head) is None:
      return None

    def embed(micro: jax.Array) -> Any:
      return head.embed(step.params, step.tokens(micro)[0])

    def unembed(micro: jax.Array, gradient: Any, state: PipelineState) -> PipelineState:
      found = head.unembed(step.params, step.tokens(micro)[0], gradient)
      return self._with_outer(state, found)

    device = self.columns.placement.device_of[0]
    return VocabularyEnds(device, embed, unembed if grads else None)

  def _gradient_pass(self, kind: str, halves: Halves, step: PipelineStep) -> Pass:
    """Returns a pass of a training step."""
    if self.head is not None and kind in ("S", "T"):
      of_head = self._head_forward if kind == "S" else self._head_backward
      return functools.partial(of_head, self.head, step)
    ahead, back = (StageProgram(self.pieces, of) if of else None for of in halves[:2])

    def does(row: Row, taken: dict[str, Any], state: PipelineState) -> PassResult:
      forward = backward = kept = None
      if ahead and halves.makes:
        state, forward, kept = self._keep(ahead, step, row, taken, state)
      elif ahead and not ahead.shape.last:  # the last stage's is made where its loss is
        forward = self._forward(ahead, step, row, taken)[0]
      if back and kind == "W":
        state = self._weights(back, step, row, state)
      elif back and halves.takes:
        state, backward = self._transposed(back, step, row, taken, state, put_off=kind == "B")
      elif back:
        state, backward = self._backward(back, step, row, taken, state, put_off=kind == "B")
      return PassResult(state, None if kind == "R" else forward, backward, kept)

    return does

  def _forward(
    self, stage: StageProgram, step: PipelineStep, row: Row, taken: dict[str, Any]
  ) -> Any:
    given = step.given(half_of(row, "f"), step.totals.running)
    weights, outer = step.parameters(stage.shape)
    return stage.forward(weights, outer, taken["f_input"], given)

  def _backward(
    self, stage: StageProgram, step: PipelineStep, row: Row, taken: dict[str, Any],
    state: PipelineState, put_off: bool,
  ) -> tuple[PipelineState, Any]:  # fmt: skip
    """Returns the state with what a stage found of a microbatch, and the gradient of its input.

    Gradients of weights that are put off leave in a slot what they will be made of.
    """
    given = step.given(half_of(row, "b"), router_sums(state.layers))
    weights, outer = step.parameters(stage.shape)
    off = step.deferred[stage.shape] if put_off else None
    taps = off.taps(weights) if off else []

    def loss(weights: Any, outer: Any, taps: Any, handed: Any) -> Any:
      of_layers = off.tapped(off.kept_off(weights), taps) if off else weights
      return stage.loss(of_layers, outer, handed, given)

    (handed, share), back, (metrics, reports) = jax.vjp(
      loss, weights, outer, taps, taken["b_input"], has_aux=True
    )
    later = jax.tree.map(jnp.zeros_like, handed) if stage.shape.last else taken["b_grad"]
    d_weights, d_outer, d_taps, d_handed = back((later, jnp.ones_like(share)))
    state = self._added(stage, state, d_weights, d_outer)
    if off:
      state = self._left(step, row, state, d_taps)
    state = state.with_metrics(metrics).with_reports(stage.shape, reports, row["b_micro"])
    return state, None if stage.shape.first else d_handed

  def _keep(
    self, stage: StageProgram, step: PipelineStep, row: Row, taken: dict[str, Any],
    state: PipelineState,
  ) -> tuple[PipelineState, Any, Any]:  # fmt: skip
    """Returns the state, what the next stage is handed, and a stage's residuals for their slot.

    The last stage's loss is made here, and the gradient of its layers' output with it.
    """
    where, running = half_of(row, "f"), router_sums(state.layers)
    parameters = step.tapped_parameters(stage.shape)
    (handed, _), (metrics, reports), left = step.kept[stage.shape].forward(
      parameters, where, taken["f_input"], running
    )
    state = state.with_metrics(metrics).with_reports(stage.shape, reports, row["f_micro"])
    gradient = []
    if stage.shape.last:
      (_, outer), given = step.parameters(stage.shape), step.given(where, running)
      loss = functools.partial(stage.head_loss, given=given)
      share, back, metrics = jax.vjp(loss, outer, handed[0], has_aux=True)
      d_outer, d_stream = back(jnp.ones_like(share))
      state, gradient = self._with_outer(state.with_metrics(metrics), d_outer), [d_stream]
    kept = step.kept_slot().pack([left, *gradient])
    return state, None if stage.shape.last else handed, kept

  def _transposed(
    self, stage: StageProgram, step: PipelineStep, row: Row, taken: dict[str, Any],
    state: PipelineState, put_off: bool,
  ) -> tuple[PipelineState, Any]:  # fmt: skip
    """Returns the state with a stage's gradients, made of its residuals, and that of its input."""
    residuals, parameters = step.kept[stage.shape], step.tapped_parameters(stage.shape)
    later, stream = taken["b_grad"], [taken["b_grad"][0]] * stage.shape.last
    like = [residuals.shapes, *stream]
    left, *gradient = step.kept_slot().unpack(taken["b_kept"], like)
    if stage.shape.last:
      later = (gradient[0], jax.tree.map(jnp.zeros_like, later[1]))
    (d_weights, d_outer, d_taps), d_handed = residuals.backward(
      parameters, half_of(row, "b"), left, (later, jnp.ones((), jnp.float32))
    )
    state = self._added(stage, state, d_weights, d_outer)
    if off := step.deferred.get(stage.shape):
      if put_off:
        state = self._left(step, row, state, d_taps)
      else:  # residuals are of taps whichever pass takes them
        state = self._added(stage, state, off.gradients(parameters[0], d_taps), {})
    return state, None if stage.shape.first else d_handed

  def _head_forward(
    self, head: SpreadHead, step: PipelineStep, row: Row, taken: dict[str, Any],
    state: PipelineState,
  ) -> PassResult:  # fmt: skip
    """Does `S`: its loss counts on the last stage's device, whose gradient it may be, too."""
    outer, labels_BL = head.outer(step.params), step.tokens(row["f_micro"])[1]
    nll, left, d_outer, d_handed = head.forward(
      outer, taken["f_input"], labels_BL, step.totals.labels
    )
    here = (jax.lax.axis_index(self.axis) == head.device).astype(jnp.float32)
    nll = jax.tree.map(lambda sum: here * sum, nll)
    none = dict.fromkeys(state.metrics["balance"], 0.0)
    found = {"loss": nll, "total_loss": nll.sum / step.totals.labels, "balance": none}
    state = self._with_outer(state, d_outer).with_metrics(found)
    slots = write_slot(state.vocabulary, row["vocabulary"], left)
    return PassResult(dataclasses.replace(state, vocabulary=slots), None, d_handed)

  def _head_backward(
    self, head: SpreadHead, step: PipelineStep, row: Row, taken: dict[str, Any],
    state: PipelineState,
  ) -> PassResult:  # fmt: skip
    """Does `T`."""
    outer, labels_BL = head.outer(step.params), step.tokens(row["b_micro"])[1]
    left = read_slot(state.vocabulary, row["vocabulary"])
    d_outer, d_handed = head.backward(
      outer, left, taken["b_grad"], labels_BL, step.totals.labels
    )
    return PassResult(self._with_outer(state, d_outer), None, d_handed)

  def _left(
    self, step: PipelineStep, row: Row, state: PipelineState, d_taps: RunTaps
  ) -> PipelineState:
    """Returns the state with what gradients that are put off will be made of."""
    left = step.deferred_slot().pack(d_taps)
    kept = write_slot(state.deferred, row["b_deferred"], left)
    return dataclasses.replace(state, deferred=kept)

  def _weights(
    self, stage: StageProgram, step: PipelineStep, row: Row, state: PipelineState
  ) -> PipelineState:
    """Returns the state with the gradients of weights that were put off."""
    off, (weights, _) = step.deferred[stage.shape], step.parameters(stage.shape)
    left = read_slot(state.deferred, row["b_deferred"])
    like = jax.eval_shape(lambda: off.taps(weights))
    d_weights = off.gradients(weights, step.deferred_slot().unpack(left, like))
    return self._added(stage, state, d_weights, {})

  def _added(
    self, stage: StageProgram, state: PipelineState, d_weights: list[Params], d_outer: Params
  ) -> PipelineState:
    """Returns the state with the gradients of a stage's weights in a microbatch."""
    state = self._with_outer(state, d_outer)
    grads = {**state.grads}
    for run, of_run in zip(stage.shape.runs, d_weights, strict=True):
      mine = self._reduced({"stack": {run.group: of_run}})["stack"][run.group]
      grads["stack"] = stage.shape.put(run, grads["stack"], mine)
    return dataclasses.replace(state, grads=grads)

  def _with_outer(self, state: PipelineState, found: Params) -> PipelineState:
    """Returns the state with gradients of parameters beside the stack, or of some leaves."""
    grads = {**state.grads}
    for name, wide in self._reduced(found).items():
      mine = {leaf: grads[name][leaf] for leaf in wide}
      grads[name] = {**grads[name], **jax.tree.map(jnp.add, mine, wide)}
    return dataclasses.replace(state, grads=grads)

  def _reduced(self, grads: Any) -> Any:
    """Returns a microbatch's gradients as they are accumulated, see `make_gradients`."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
    return self.reducer.per_microbatch(wide)

  def _count(self, step: PipelineStep, zeros: Any) -> Any:
    """Returns the router sums of the whole step, by a table of forward passes alone."""
    with jax.named_scope("count_choices"):
      ends = self._ends(step, grads=False)
      sums = self._scan(self._counting, step, self._counting_pass, zeros, ends)
    return jax.lax.stop_gradient(self.decoder.parallel.psum_tokens(sums))

  def _counting_pass(self, kind: str, halves: Halves, step: PipelineStep) -> Pass:
    """Returns a forward pass whose state are the sums of routers."""
    if kind == "S":  # no router is in the head
      return lambda row, taken, sums: PassResult(sums)
    assert halves.ahead is not None, kind
    stage = StageProgram(self.pieces, halves.ahead)

    def does(row: Row, taken: dict[str, Any], sums: Any) -> PassResult:
      handed, found = self._forward(stage, step, row, taken)
      for run, places in zip(stage.shape.runs, found, strict=True):
        sums = stage.shape.put(run, sums, router_sums({run.group: places})[run.group])
      return PassResult(sums, handed)

    return does

  def _empty(self, step: PipelineStep) -> PipelineState:
    """Returns the state before the first tick, of the shapes that passes find."""
    found = [(shape, *step.found_of(shape)) for shape in dict.fromkeys(self._shape_of)]
    grads, slots = jax.eval_shape(self._reduced, step.params), self.columns.slots
    state = empty_state(step.params, grads, found, self.num_micro)

    def pool(count: int, slot: Any) -> Any:
      return jax.tree.map(functools.partial(empty_slots, count), slot)

    deferred = pool(slots.deferred, step.deferred_slot().shapes())
    if self.head is None:
      return dataclasses.replace(state, deferred=deferred)
    labels_BL = step.tokens(np.int32(0))[1]
    left = self.head.leaves(self.head.outer(step.params), labels_BL, step.message())
    vocabulary = pool(slots.vocabulary, left)
    return dataclasses.replace(state, deferred=deferred, vocabulary=vocabulary)
