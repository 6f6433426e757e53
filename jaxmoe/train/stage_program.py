"""The program of a stage: its layers, with the embedding before and the head after.

Stages whose layers lie alike in the memory of their devices are one program, which is told the
depth of its first layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.metrics import Mean
from jaxmoe.core.param_names import LayerGroupSizes
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.layer_runs import LayerRun, layer_runs
from jaxmoe.models.loss_pieces import LossPieces, Reports
from jaxmoe.models.stack import Handed
from jaxmoe.models.transformer import Params
from jaxmoe.moe.balance import StepTotals
from jaxmoe.parallel.stages import Stages


@dataclasses.dataclass(frozen=True)
class StageShape:
  """How a stage's layers lie on its device.

  Attributes:
    runs: Of its layers; depths count from its first layer, rows from the device's first.
    first: Whether it begins with the embedding.
    last: Whether it ends with the head.
  """

  runs: tuple[LayerRun, ...]
  first: bool
  last: bool

  @classmethod
  def of(cls, stages: Stages, stage: int, placed: LayerGroupSizes) -> StageShape:
    """Returns that of a stage, whose layers lie in memory as `placed` says."""
    start, stop = stages.bounds(stage)
    ends = not stages.spread_vocabulary
    first, last = ends and stage == 0, ends and stage == len(stages.counts) - 1
    runs = (_local(run, start, placed, stages) for run in layer_runs(placed, start, stop))
    return cls(tuple(runs), first, last)

  @property
  def without_head(self) -> StageShape:
    """The same layers, with no head after them."""
    return dataclasses.replace(self, last=False)

  def outer(self, params: Params, tied: bool) -> Params:
    """Returns the parameters beside the stack that the stage reads."""
    names = ["embed"] * (self.first or (self.last and tied)) + ["final_norm", "head"] * self.last
    return {name: params[name] for name in names if name in params}

  def weights(self, params: Params) -> list[Params]:
    """Returns the leaves of its layers, by run, out of those of its device."""
    return [run.take(params["stack"]) for run in self.runs]

  def put(self, run: LayerRun, stack: Any, found: Any) -> Any:
    """Returns what is kept by group and place with what a run found added to its rows."""
    group = dict(stack[run.group])
    for place, of in found.items():
      row, size = run.row(place), run.stop - run.start
      group[place] = jax.tree.map(
        lambda all_of, leaf, row=row, size=size: jax.lax.dynamic_update_slice_in_dim(
          all_of, all_of[row : row + size] + leaf, row, 0
        ),
        group[place], of,
      )  # fmt: skip
    return {**stack, run.group: group}


def _local(run: LayerRun, first: int, placed: LayerGroupSizes, stages: Stages) -> LayerRun:
  """Returns a run as it lies on its device."""
  rows = []
  for place, row in zip(run.positions, run.rows, strict=True):
    room = len(placed[int(run.group)][2][int(place)]) // stages.num_devices  # type: ignore[misc]
    rows.append(row % room)
  return dataclasses.replace(
    run, start=0, stop=run.stop - run.start, depth=run.depth - first, rows=tuple(rows)
  )


@dataclasses.dataclass(frozen=True)
class StageInputs:
  """What a stage is given beside its weights.

  Attributes:
    depth: Of its first layer.
    tokens: Of the microbatch.
    labels_BL: Of it.
    keys: Of its forward pass.
    totals: Of the step; layers' sums are by the rows of this device.
  """

  depth: jax.Array
  tokens: Tokens
  labels_BL: jax.Array
  keys: Keys
  totals: StepTotals


@dataclasses.dataclass(frozen=True)
class StageProgram:
  """The functions of stages of one shape.

  Attributes:
    pieces: Of the model's loss.
    shape: Of the stage.
  """

  pieces: LossPieces
  shape: StageShape

  def loss(
    self, weights: list[Params], outer: Params, handed: Handed, given: StageInputs
  ) -> tuple[tuple[Handed, jax.Array], tuple[dict[str, Any], Reports]]:
    """Returns what the next stage is handed and this device's share of the loss.

    Beside them: the stage's shares of the metrics, and the reports of its runs. The first stage
    makes of tokens what it is handed; of the last one only the loss is of use.
    """
    pieces, decoder, runs = self.pieces, self.pieces.decoder, self._runs(given.depth)
    ready = decoder.parallel.gather_params(outer)
    handed = self._handed(ready, handed, given.tokens)
    (handed, losses), reports = pieces.layers(
      runs, weights, handed, given.tokens, given.keys, given.totals
    )
    nll = Mean(*jnp.zeros((2,), jnp.float32))
    if self.shape.last:
      nll = pieces.head(ready, handed[0], given.labels_BL)
    total = pieces.total(nll, runs, losses, given.totals)
    metrics = {"loss": nll, "total_loss": total, "balance": pieces.balance(runs, reports)}
    return (handed, total / decoder.parallel.tensor_size), (metrics, reports)

  def head_loss(
    self, outer: Params, x_BLD: jax.Array, given: StageInputs
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns this device's share of the loss of the last layer's output, and of the metrics."""
    pieces, parallel = self.pieces, self.pieces.decoder.parallel
    nll = pieces.head(parallel.gather_params(outer), x_BLD, given.labels_BL)
    total = pieces.total(nll, (), [], given.totals)
    return total / parallel.tensor_size, {"loss": nll, "total_loss": total, "balance": {}}

  def forward(
    self, weights: list[Params], outer: Params, handed: Handed, given: StageInputs
  ) -> tuple[Handed, list[dict[str, Any]]]:
    """Returns what the next stage is handed, and the sums of each run by place."""
    decoder, sums = self.pieces.decoder, []
    handed = self._handed(decoder.parallel.gather_params(outer), handed, given.tokens)
    for run, leaves in zip(self._runs(given.depth), weights, strict=True):
      handed, found = decoder.run_layers(run, leaves, handed, given.tokens, given.keys)
      sums.append(found)
    return handed, sums

  def _runs(self, depth: jax.Array) -> list[LayerRun]:
    return [dataclasses.replace(run, depth=depth + run.depth) for run in self.shape.runs]

  def _handed(self, ready: Params, handed: Handed, tokens: Tokens) -> Handed:
    return self.pieces.embed(ready, tokens) if self.shape.first else handed
