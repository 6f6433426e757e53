"""The gradient of a step's loss over the stages of a pipeline: what `make_gradients` gives.

Every device runs the passes of its columns (`parallel/pipelines`) over its own stages' layers and
adds up their gradients and metrics, as accumulation over microbatches does; `parallel/tick_scan.py`
moves what stages hand each other. A forward pass keeps its stage's input, from which the backward
pass makes the stage again: what it finds of metrics counts once, there. What lies on all stages,
the embedding and the head, has its gradient on those that use it; the reducer sums over devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Compare, Tokens
from jaxmoe.models.loss_pieces import LossPieces
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.moe.balance import StepTotals
from jaxmoe.parallel.pipelines import (
  KINDS,
  Columns,
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
from jaxmoe.train.deferred_weights import DeferredWeights, FlatSlot, find_deferred
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
from jaxmoe.train.spread_head import SpreadHead
from jaxmoe.train.stage_program import StageInputs, StageProgram, StageShape

Shapes = tuple[StageShape | None, StageShape | None]
"""Of the stages of a pass's forward and backward halves."""


@dataclasses.dataclass(frozen=True)
class _Step:
  """What the passes of one step read: parameters and rows of this device, and what is known."""

  params: Params
  micro: Batch
  keys: Keys
  totals: StepTotals
  deferred: Mapping[StageShape, DeferredWeights] = dataclasses.field(default_factory=dict)

  def slot(self, params: Params) -> FlatSlot:
    """Returns the slots of what gradients of weights that are put off are made of."""
    return FlatSlot.of([
      jax.eval_shape(lambda of=of, shape=shape: of.taps(shape.weights(params)))
      for shape, of in self.deferred.items()
    ])  # fmt: skip


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
  """

  def __init__(
    self, decoder: Decoder, table: Table, stages: Stages, axis: str, reducer: GradientReducer,
    compare: Compare | None = None,
  ):  # fmt: skip
    self.decoder, self.axis, self.reducer, self.compare = decoder, axis, reducer, compare
    self.pieces, self.num_micro = LossPieces(decoder), table.num_micro
    self.columns, forward = lower(table), forward_only(table.placement, table.num_micro)
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
    self._shape_of = [
      StageShape.of(stages, stage, decoder.layer_groups) for stage in range(len(stages.counts))
    ]

  def __call__(
    self, params: Params, batch: Batch, keys: Keys
  ) -> tuple[Params, Metrics, Statistics]:
    """Returns the gradient as the reducer makes it, metrics and statistics."""
    parallel = self.decoder.parallel
    totals = self.pieces.totals(batch["segment"] > 0, batch["labels"], self.num_micro)
    micro = jax.tree.map(lambda x: x.reshape(self.num_micro, -1, *x.shape[1:]), batch)
    zeros = local_zero_sums(self.decoder, params)
    step = _Step(params, micro, keys, dataclasses.replace(totals, running=zeros))
    if self.count_first:
      whole = self._count(step, zeros)
      step = dataclasses.replace(step, totals=dataclasses.replace(step.totals, whole=whole))
    step = dataclasses.replace(step, deferred=self._put_off(step))
    state = self._scan(
      self.columns, step, self._gradient_pass, self._empty(step), self._ends(step, grads=True)
    )
    metrics = {**self._over_stages(parallel.psum_tokens(state.metrics)), "layers": state.layers}
    corrections = balance_corrections(self.decoder, metrics, self.count_first, self._over_stages)
    metrics = {**metrics, "tokens": totals.tokens, **corrections}
    return self.reducer.finalize(state.grads), metrics, state.joined_statistics()

  def _over_stages(self, tree: Any) -> Any:
    return jax.lax.psum(tree, self.axis)

  def _scan(
    self, columns: Columns, step: _Step, make: Callable[[str, Shapes, _Step], Pass], state: Any,
    ends: VocabularyEnds | None,
  ) -> Any:  # fmt: skip
    """Returns the state after all ticks of these columns, whose passes `make` makes."""
    found: dict[tuple[str, Shapes], int] = {("idle", (None, None)): 0}
    passes: list[tuple[str, Pass]] = [("idle", lambda row, taken, state: PassResult(state))]
    which_PK = np.zeros(columns.kind.shape, np.int32)
    for (device, tick), code in np.ndenumerate(columns.kind):
      ahead, back = (
        self._shape_of[columns.stages_PN[device, slot]] if slot >= 0 else None
        for slot in (columns.f_stage[device, tick], columns.b_stage[device, tick])
      )
      key = KINDS[code], (ahead, back)
      if key not in found:
        found[key] = len(passes)
        passes.append((key[0], make(*key, step)))
      which_PK[device, tick] = found[key]
    return scan_ticks(columns, self.axis, passes, which_PK, self._message(step), state, ends)

  def _ends(self, step: _Step, grads: bool) -> VocabularyEnds | None:
    """Returns what all devices do with the embedding where it lies over all of them."""
    if (head := self.head) is None:
      return None

    def embed(micro: jax.Array) -> Any:
      return head.embed(step.params, self._tokens(step, micro)[0])

    def unembed(micro: jax.Array, gradient: Any, state: PipelineState) -> PipelineState:
      found = head.unembed(step.params, self._tokens(step, micro)[0], gradient)
      return self._with_outer(state, found)

    device = self.columns.placement.device_of[0]
    return VocabularyEnds(device, embed, unembed if grads else None)

  def _gradient_pass(self, kind: str, shapes: Shapes, step: _Step) -> Pass:
    """Returns a pass of a training step."""
    if self.head is not None and kind in ("S", "T"):
      of_head = self._head_forward if kind == "S" else self._head_backward
      return functools.partial(of_head, self.head, step)
    ahead, back = (StageProgram(self.pieces, shape) if shape else None for shape in shapes)

    def does(row: Row, taken: dict[str, Any], state: PipelineState) -> PassResult:
      forward = backward = None
      if ahead and not ahead.shape.last:  # the last stage's is made where its loss is
        forward = self._forward(ahead, step, row, taken)[0]
      if back and kind == "W":
        state = self._weights(back, step, row, state)
      elif back:
        state, backward = self._backward(back, step, row, taken, state, put_off=kind == "B")
      return PassResult(state, forward, backward)

    return does

  def _forward(self, stage: StageProgram, step: _Step, row: Row, taken: dict[str, Any]) -> Any:
    given = self._given(step, row, "f", step.totals.running)
    weights, outer = self._parameters(stage, step)
    return stage.forward(weights, outer, taken["f_input"], given)

  def _backward(
    self, stage: StageProgram, step: _Step, row: Row, taken: dict[str, Any], state: PipelineState,
    put_off: bool,
  ) -> tuple[PipelineState, Any]:  # fmt: skip
    """Returns the state with what a stage found of a microbatch, and the gradient of its input.

    Gradients of weights that are put off leave in a slot what they will be made of.
    """
    given = self._given(step, row, "b", router_sums(state.layers))
    weights, outer = self._parameters(stage, step)
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
      left = step.slot(step.params).pack(d_taps)
      kept = write_slot(state.deferred, row["b_deferred"], left)
      state = dataclasses.replace(state, deferred=kept)
    state = state.with_metrics(metrics).with_reports(stage.shape, reports, row["b_micro"])
    return state, None if stage.shape.first else d_handed

  def _head_forward(
    self, head: SpreadHead, step: _Step, row: Row, taken: dict[str, Any], state: PipelineState
  ) -> PassResult:
    """Does `S`: its loss counts on the last stage's device, whose gradient it may be, too."""
    outer, labels_BL = head.outer(step.params), self._tokens(step, row["f_micro"])[1]
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
    self, head: SpreadHead, step: _Step, row: Row, taken: dict[str, Any], state: PipelineState
  ) -> PassResult:
    """Does `T`."""
    outer, labels_BL = head.outer(step.params), self._tokens(step, row["b_micro"])[1]
    left = read_slot(state.vocabulary, row["vocabulary"])
    d_outer, d_handed = head.backward(
      outer, left, taken["b_grad"], labels_BL, step.totals.labels
    )
    return PassResult(self._with_outer(state, d_outer), None, d_handed)

  def _weights(
    self, stage: StageProgram, step: _Step, row: Row, state: PipelineState
  ) -> PipelineState:
    """Returns the state with the gradients of weights that were put off."""
    off, (weights, _) = step.deferred[stage.shape], self._parameters(stage, step)
    left = read_slot(state.deferred, row["b_deferred"])
    like = jax.eval_shape(lambda: off.taps(weights))
    d_weights = off.gradients(weights, step.slot(step.params).unpack(left, like))
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

  def _parameters(self, stage: StageProgram, step: _Step) -> tuple[list[Params], Params]:
    outer = stage.shape.outer(step.params, self.decoder.config.tied)
    return stage.shape.weights(step.params), outer

  def _given(self, step: _Step, row: Row, half: str, running: Any) -> StageInputs:
    """Returns what a stage is given in the forward (f) or backward (b) half of a pass."""
    micro, device = row[f"{half}_micro"], jax.lax.axis_index(self.axis)
    tokens, labels_BL = self._tokens(step, micro)
    here = self.decoder.parallel.row_group() * self.num_micro + micro
    totals = dataclasses.replace(step.totals, running=running)
    depth = jnp.asarray(self._depth_PN)[device, row[f"{half}_stage"]]
    return StageInputs(depth, tokens, labels_BL, step.keys.at(here), totals)

  def _tokens(self, step: _Step, micro: jax.Array | np.int32) -> tuple[Tokens, jax.Array]:
    """Returns what is known of a microbatch's tokens, and their labels."""
    batch = jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, micro, keepdims=False), step.micro
    )
    tokens = self.decoder.parallel.spread_rows(Tokens.of_batch(batch))
    if self.compare is not None:
      tokens = dataclasses.replace(tokens, domain=batch["domain"], compare=self.compare)
    return tokens, batch["labels"]

  def _count(self, step: _Step, zeros: Any) -> Any:
    """Returns the router sums of the whole step, by a table of forward passes alone."""
    with jax.named_scope("count_choices"):
      ends = self._ends(step, grads=False)
      sums = self._scan(self._counting, step, self._counting_pass, zeros, ends)
    return jax.lax.stop_gradient(self.decoder.parallel.psum_tokens(sums))

  def _counting_pass(self, kind: str, shapes: Shapes, step: _Step) -> Pass:
    """Returns a forward pass whose state are the sums of routers."""
    if kind == "S":  # no router is in the head
      return lambda row, taken, sums: PassResult(sums)
    assert shapes[0] is not None, kind
    stage = StageProgram(self.pieces, shapes[0])

    def does(row: Row, taken: dict[str, Any], sums: Any) -> PassResult:
      handed, found = self._forward(stage, step, row, taken)
      for run, places in zip(stage.shape.runs, found, strict=True):
        sums = stage.shape.put(run, sums, router_sums({run.group: places})[run.group])
      return PassResult(sums, handed)

    return does

  def _message(self, step: _Step) -> Any:
    """Returns the shapes of what a stage hands the next one."""

    def embedded() -> Any:
      ready = self.decoder.parallel.gather_params({"embed": step.params["embed"]})
      return self.pieces.embed(ready, self._given(step, _FIRST, "b", None).tokens)

    return jax.eval_shape(embedded)

  def _empty(self, step: _Step) -> PipelineState:
    """Returns the state before the first tick, of the shapes that passes find."""
    handed, found = self._message(step), []
    for shape in dict.fromkeys(self._shape_of):
      stage = StageProgram(self.pieces, shape)

      def reported(handed: Any, stage: StageProgram = stage) -> Any:
        given = self._given(step, _FIRST, "b", step.totals.running)
        return stage.loss(*self._parameters(stage, step), handed, given)[1]

      found.append((shape, *jax.eval_shape(reported, handed)))
    grads = jax.eval_shape(self._reduced, step.params)
    state = empty_state(step.params, grads, found, self.num_micro)
    slots = functools.partial(empty_slots, self.columns.slots.deferred)
    deferred = jax.tree.map(slots, step.slot(step.params).shapes())
    if self.head is None:
      return dataclasses.replace(state, deferred=deferred)
    labels_BL = self._tokens(step, np.int32(0))[1]
    left = self.head.leaves(self.head.outer(step.params), labels_BL, handed)
    count = self.columns.slots.vocabulary
    vocabulary = jax.tree.map(functools.partial(empty_slots, count), left)
    return dataclasses.replace(state, deferred=deferred, vocabulary=vocabulary)

  def _put_off(self, step: _Step) -> dict[StageShape, DeferredWeights]:
    """Returns which weights' gradients stages put off; none where the table puts none off."""
    if not self.columns.slots.deferred:
      return {}
    handed, found = self._message(step), {}
    for shape in dict.fromkeys(self._shape_of):
      stage = StageProgram(self.pieces, shape)
      weights, outer = self._parameters(stage, step)

      def trace(weights: list[Params], stage: StageProgram = stage, outer: Any = outer) -> Any:
        given = self._given(step, _FIRST, "b", step.totals.running)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), handed)
        return stage.loss(weights, outer, zeros, given)[0]

      gathers = [
        functools.partial(self.decoder.parallel.gather_layer, run.group) for run in shape.runs
      ]
      found[shape] = find_deferred(trace, weights, gathers)
    return found


_FIRST: Any = {name: np.int32(0) for name in ("b_stage", "b_micro")}
"""The columns of some pass, for its shapes."""
