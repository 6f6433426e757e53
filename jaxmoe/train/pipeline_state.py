"""The state that a device of a pipeline carries: gradients, metrics, sums of its layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.param_names import LayerAddress
from jaxmoe.models.loss_pieces import Reports, zero_sums
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.train.gradients import Metrics, Statistics, map_layers, without
from jaxmoe.train.stage_program import StageShape


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["grads", "metrics", "layers", "statistics", "deferred", "vocabulary"],
  meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class PipelineState:
  """Sums over the microbatches that have had their backward pass.

  Attributes:
    grads: Of this device's parameters, float32, as the reducer accumulates them.
    metrics: Loss, total and each balance loss by name: shares of this device's stages.
    layers: `MoESums` by group and place, stacked over this device's rows.
    statistics: Of each token, by group and place, (rows, M, ...).
    deferred: Slots of what gradients of weights that are put off will need.
    vocabulary: Likewise of a head that lies over all devices.
  """

  grads: Params
  metrics: Metrics
  layers: Any
  statistics: Statistics
  deferred: Any = None
  vocabulary: Any = None

  def with_metrics(self, metrics: Metrics) -> PipelineState:
    """Returns the state with a stage's metrics added; it has no balance losses of other layers."""
    balance = {**self.metrics["balance"]}
    for name, value in metrics["balance"].items():
      balance[name] = balance[name] + value
    rest = ("loss", "total_loss")
    added = {name: jax.tree.map(jnp.add, self.metrics[name], metrics[name]) for name in rest}
    return dataclasses.replace(self, metrics={**added, "balance": balance})

  def with_reports(
    self, shape: StageShape, reports: Reports, micro: jax.Array
  ) -> PipelineState:
    """Returns the state with the sums and statistics that a stage's layers reported."""
    layers, statistics = self.layers, self.statistics
    for run, report in zip(shape.runs, reports, strict=True):
      sums = {run.group: sums_of(report)}
      found = without(sums, "per_sequence", "statistics")[run.group]
      layers = shape.put(run, layers, found)
      group = dict(statistics[run.group])
      for place, of in map_layers(lambda of: of.statistics, sums)[run.group].items():
        row = run.row(place)
        group[place] = jax.tree.map(
          lambda all_of, leaf, row=row: all_of.at[row : row + leaf.shape[0], micro].set(leaf),
          group[place], of,
        )  # fmt: skip
      statistics = {**statistics, run.group: group}
    return dataclasses.replace(self, layers=layers, statistics=statistics)

  def joined_statistics(self) -> Statistics:
    """Returns the statistics with microbatches one after the other, (rows, M * T, ...)."""
    return jax.tree.map(
      lambda leaf: leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:]), self.statistics
    )


def sums_of(report: dict[str, Any]) -> dict[str, Any]:
  """Returns `MoESums` by place of a run's report; None of dense layers."""
  return {place: None if of is None else of[0] for place, of in report.items()}


def rows_of(params: Params, s: str, place: str) -> int:
  """Returns how many layers of a place a device has room for."""
  of = params["stack"][s][LayerAddress.parse(s, place).position]
  return int(jax.tree.leaves(of)[0].shape[0])


def local_zero_sums(decoder: Decoder, params: Params) -> Any:
  """Returns the sums of routers over no tokens, by group and place, for a device's rows."""

  def zeros(s: str, place: str, leaf: Any) -> jax.Array:
    return jnp.zeros((rows_of(params, s, place), *leaf.shape[1:]), leaf.dtype)

  return {
    s: {
      place: jax.tree.map(functools.partial(zeros, s, place), of) for place, of in places.items()
    }
    for s, places in jax.eval_shape(lambda: zero_sums(decoder)).items()
  }


def empty_state(
  params: Params, grads: Any, found: list[tuple[StageShape, Metrics, Reports]], num_micro: int
) -> PipelineState:
  """Returns the state before the first tick.

  Args:
    params: Of this device.
    grads: The shapes of what is accumulated for them.
    found: Of each shape of stage, the shapes of what it finds of a microbatch.
    num_micro: M.
  """
  layers: dict[str, Any] = {s: {} for s in params["stack"]}
  statistics: dict[str, Any] = {s: {} for s in params["stack"]}
  balance: dict[str, Any] = {}
  for shape, metrics, reports in found:
    balance.update(metrics["balance"])
    for run, report in zip(shape.runs, reports, strict=True):
      sums, s = {run.group: sums_of(report)}, run.group
      for place, of in without(sums, "per_sequence", "statistics")[s].items():
        layers[s][place] = _stacked(of, (rows_of(params, s, place),))
      for place, of in map_layers(lambda of: of.statistics, sums)[s].items():
        statistics[s][place] = _stacked(of, (rows_of(params, s, place), num_micro))
  shapes = {**found[0][1], "balance": balance}
  grads, shapes = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (grads, shapes))
  return PipelineState(grads, shapes, layers, statistics)


def _stacked(tree: Any, first: tuple[int, ...]) -> Any:
  """Returns zeros of a run's leaves, with other dims in place of that of its repeats."""
  return jax.tree.map(lambda leaf: jnp.zeros((*first, *leaf.shape[1:]), leaf.dtype), tree)
