"""The training loss in pieces, each a pure function of its own weights with a vjp of its own.

    x = pieces.embed(params, tokens)
    for runs in stages:  # layers a..b
      (x, aux_losses), reports = pieces.layers(runs, weights, x, tokens, keys, totals)
    nll = pieces.head(params, x, labels)
    loss = pieces.total(nll, runs, aux_losses, totals)

A stage is handed the stream and what the gates of the layer before hand on, and has its share of
the auxiliary losses. Composed in one program the pieces are the loss of a step, as
`train/gradients.py` differentiates it; compiled apart they serve stages of a pipeline, and weights
that are read from files a few layers at a time. Parameters are ready for products: who stores them
in shards gathers them first (`ParallelContext.gather_params`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.metrics import Mean
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.layer_runs import LayerRun, join_runs, layer_runs
from jaxmoe.models.stack import Handed
from jaxmoe.models.transformer import Decoder, Params, Routed
from jaxmoe.moe.balance import StepTotals
from jaxmoe.moe.layer import MoESums
from jaxmoe.moe.routers import Adaptive
from jaxmoe.moe.routing import RouterSums

AuxLosses = list[dict[str, dict[str, jax.Array]]]
"""Of each run, by place and name: the weighted losses of its repeats."""
Reports = list[dict[str, Any]]
"""Of each run, by place: (sums, losses by name, not weighted) of each repeat; None if dense."""


@dataclasses.dataclass(frozen=True)
class LossPieces:
  """The pieces of a model's loss.

  Attributes:
    decoder: The model.
  """

  decoder: Decoder

  def __call__(
    self, params: Params, tokens: Tokens, labels_BL: jax.Array, keys: Keys, totals: StepTotals
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns a microbatch's share of the step's loss, and its shares of the metrics."""
    runs = self.runs()
    weights = [run.take(params["stack"]) for run in runs]
    handed = self.embed(params, tokens)
    (handed, losses), reports = self.layers(runs, weights, handed, tokens, keys, totals)
    nll = self.head(params, handed[0], labels_BL)
    total = self.total(nll, runs, losses, totals)
    balance, layers = self.balance(runs, reports), self.sums(runs, reports)
    return total, {"loss": nll, "total_loss": total, "balance": balance, "layers": layers}

  def totals(
    self, valid_BL: jax.Array, labels_BL: jax.Array, num_micro: int = 1, num_groups: int = 1
  ) -> StepTotals:
    """Returns what a step's microbatches know of it before any has run.

    Args:
      valid_BL: Whether each token of the step's batch is one, and not padding.
      labels_BL: Negative where a token has none.
      num_micro: The number of microbatches.
      num_groups: On how many data-parallel devices a microbatch counts as lying.
    """
    parallel = self.decoder.parallel
    counted = (labels_BL >= 0, valid_BL, parallel.any_of_row(valid_BL))
    labels, tokens, rows = parallel.psum_tokens(
      tuple(jnp.sum(what).astype(jnp.float32) for what in counted)
    )
    running = zero_sums(self.decoder)
    return StepTotals(tokens, rows, num_micro, num_groups, None, running, jnp.maximum(labels, 1))

  def runs(self, start: int = 0, stop: int | None = None) -> list[LayerRun]:
    """Returns the runs of layers start..stop-1, for `layers`; of all, the layer groups."""
    return layer_runs(self.decoder.layer_groups, start, stop)

  def embed(self, params: Params, tokens: Tokens) -> Handed:
    """Returns what the first layer is handed; reads `embed`."""
    return self.decoder.embed(params, tokens.id), self.decoder.first_logits(tokens)

  def layers(
    self,
    runs: Sequence[LayerRun],
    weights: Sequence[Params],
    handed: Handed,
    tokens: Tokens,
    keys: Keys | None,
    totals: StepTotals,
  ) -> tuple[tuple[Handed, AuxLosses], Reports]:
    """Returns what the next layer is handed and the share of auxiliary losses; and the reports.

    Args:
      runs: Of the layers.
      weights: The leaves of each run, as `LayerRun.take` cuts them out of `params["stack"]`.
      handed: By the piece before.
      tokens: What is known of each token.
      keys: Randomness of the forward pass.
      totals: Of the step.
    """
    losses: AuxLosses = []
    reports: Reports = []
    for run, leaves in zip(runs, weights, strict=True):
      handed, sums = self.decoder.run_layers(run, leaves, handed, tokens, keys)
      losses.append({})
      reports.append(dict.fromkeys(sums))
      for place, of_place in sums.items():
        if of_place is not None:
          losses[-1][place], reports[-1][place] = self._reported(run, place, of_place, totals)
    return (handed, losses), reports

  def head(
    self, params: Params, x_BLD: jax.Array, labels_BL: jax.Array, chunk: int | None = None
  ) -> Mean:
    """Returns the negative log-likelihood of labels; reads `final_norm` and `head` or `embed`."""
    x_BLD = self.decoder.final_norm(params, x_BLD)
    with jax.named_scope("loss"):
      return Mean.of(self.decoder.nll(params, x_BLD, labels_BL, chunk), labels_BL >= 0)

  def total(
    self, nll: Mean, runs: Sequence[LayerRun], losses: AuxLosses, totals: StepTotals
  ) -> jax.Array:
    """Returns the loss of a microbatch, its share of a step's; linear in what pieces found.

    Args:
      nll: Of the labels.
      runs: Those of all pieces, in order; of a stage, whose share it then is, its own.
      losses: Of each run.
      totals: Of the step.
    """
    joined, total = join_runs(runs, losses), nll.sum / totals.labels
    for s, place, aux_loss in self._aux_losses(joined):
      total = total + self._of_step(aux_loss, joined[s][place][aux_loss.name])
    return total

  def balance(self, runs: Sequence[LayerRun], reports: Reports) -> dict[str, jax.Array]:
    """Returns each auxiliary loss by name, summed over layers, without its weight."""
    joined, balance = join_runs(runs, reports), dict[str, Any]()
    for s, place, aux_loss in self._aux_losses(joined):
      share = self._of_step(aux_loss, joined[s][place][1][aux_loss.name])
      balance[aux_loss.name] = balance.get(aux_loss.name, 0.0) + share
    return balance

  def sums(self, runs: Sequence[LayerRun], reports: Reports) -> dict[str, dict[str, Any]]:
    """Returns `MoESums` by group and place, stacked over repeats; None for dense layers."""
    return {
      s: {place: None if report is None else report[0] for place, report in places.items()}
      for s, places in join_runs(runs, reports).items()
    }

  def _reported(
    self, run: LayerRun, place: str, sums: MoESums, totals: StepTotals
  ) -> tuple[dict[str, jax.Array], tuple[MoESums, dict[str, jax.Array]]]:
    """Returns weighted losses by name, and a place's sums over all devices and plain losses."""
    layer = self.decoder.routed_layers()[run.group][place]
    whole = None if totals.whole is None else run.take(totals.whole)[place]
    running = run.take(totals.running)[place]
    here = dataclasses.replace(totals, whole=whole, running=running)
    sums, weighted, plain = self._over_devices(sums), dict[str, Any](), dict[str, Any]()
    with jax.named_scope("balance"):
      for aux_loss in layer.balance:
        plain[aux_loss.name], weighted[aux_loss.name] = _of_repeats(aux_loss, layer, sums, here)
    return weighted, (sums, plain)

  def _over_devices(self, sums: MoESums) -> MoESums:
    """Returns a layer's sums over the tokens of all devices; statistics of this one's.

    Sums by row are of this device's rows, over all that have parts of them.
    """
    mine = dataclasses.replace(sums, per_sequence=None, statistics=None, routing=None)
    parallel = self.decoder.parallel
    everywhere, rows = parallel.psum_tokens(mine), parallel.psum_context(sums.per_sequence)
    return dataclasses.replace(everywhere, per_sequence=rows, statistics=sums.statistics)

  def _of_step(self, aux_loss: Any, loss_R: jax.Array) -> jax.Array:
    """Returns this device's share of a loss of all repeats."""
    loss, parallel = jnp.sum(loss_R), self.decoder.parallel
    # Shares of rows are its context group's own; every token group has the others.
    groups = parallel.context_size if aux_loss.per_sequence else parallel.num_token_groups
    return loss if aux_loss.per_sequence and groups == 1 else loss / groups

  def _aux_losses(self, found: Any) -> Iterator[tuple[str, str, Any]]:
    """Yields group, place and record of every auxiliary loss of places that were found."""
    for s, places in self.decoder.routed_layers().items():
      for place, layer in places.items():
        for aux_loss in layer.balance if place in found.get(s, {}) else ():
          yield s, place, aux_loss


def _of_repeats(
  aux_loss: Any, layer: Routed, sums: MoESums, totals: StepTotals
) -> tuple[jax.Array, jax.Array]:
  """Returns an auxiliary loss of each repeat of a pattern's position, plain and weighted."""

  def of_repeat(sums: Any, rows: Any, whole: Any, running: Any) -> tuple[jax.Array, jax.Array]:
    here = dataclasses.replace(totals, whole=whole, running=running)
    share = aux_loss.share(sums, rows, here, layer)
    return share, aux_loss.weight_of(sums) * share

  return jax.vmap(of_repeat)(sums.router, sums.per_sequence, totals.whole, totals.running)


def zero_sums(decoder: Decoder) -> dict[str, dict[str, RouterSums]]:
  """Returns the sums of routers over no tokens, by group and place, stacked over repeats."""
  repeats = {str(s): group.repeats for s, group in enumerate(decoder.config.stack)}

  def zeros(repeats: int, layer: Routed) -> RouterSums:
    one, each = jnp.zeros(repeats), jnp.zeros((repeats, layer.num_routable))
    coefficient = one if isinstance(layer.router, Adaptive) else None
    shares = None if layer.router.sum_to_1 else each
    return RouterSums(each, each, one, one, one, each, coefficient, shares)

  return {
    s: {j: zeros(repeats[s], layer) for j, layer in blocks.items()}
    for s, blocks in decoder.routed_layers().items()
  }
