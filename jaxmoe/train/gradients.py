"""The gradient of a step's loss, whole or accumulated over microbatches: the same numbers.

Token losses are divided by the labels of the whole step, and balance losses are given what they
must know of it (`moe/balance/aux_loss.py`), so that the microbatches' losses, gradients and metrics
are shares that add up. Devices' shares are added up alike (`core/parallel_context.py`): everything
below runs on each device for its rows of the batch, and the lines with `parallel.psum_tokens` sum
over devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Compare, Tokens
from jaxmoe.models.loss_pieces import LossPieces, zero_sums
from jaxmoe.models.transformer import Decoder, Params, Routed
from jaxmoe.moe.balance import StepTotals
from jaxmoe.moe.layer import MoESums

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
Layers = dict[str, dict[str, Routed]]
Sums = dict[str, dict[str, Any]]
Statistics = dict[str, dict[str, Any]]
"""What buffers of routers are updated from, of each token; by place as `Sums`."""
Gradients = Callable[[Params, Batch, Keys], tuple[Params, Metrics, Statistics]]


def counts_first(decoder: Decoder, num_micro: int) -> bool:
  """Whether a step runs a forward pass for the router's sums before its gradient pass."""
  aux_losses = (aux_loss for _, _, _, aux_loss in _aux_losses(decoder.routed_layers()))
  return num_micro > 1 and any(
    aux_loss.needs_step_totals and aux_loss.weight > 0 for aux_loss in aux_losses
  )


class GradientReducer(Protocol):
  """The reduction of gradients over devices; `parallel/zero.py` has the one of ZeRO."""

  def per_microbatch(self, grads: Params) -> Params:
    """Returns a microbatch's gradients as they are accumulated."""

  def finalize(self, grads: Params) -> Params:
    """Returns the sum over devices of what was accumulated."""


class NoReduction:
  """One device has nothing to sum with."""

  def per_microbatch(self, grads: Params) -> Params:
    """Returns a microbatch's gradients as they are accumulated."""
    return grads

  def finalize(self, grads: Params) -> Params:
    """Returns what was accumulated."""
    return grads


def make_gradients(
  decoder: Decoder,
  num_micro: int,
  num_groups: int = 1,
  compare: Compare | None = None,
  reducer: GradientReducer | None = None,
) -> Gradients:
  """Returns the function from parameters, batch and keys to gradient, metrics and statistics.

  The loss is the mean negative log-likelihood in nats over scored labels, plus the weighted
  balance losses summed over MoE layers. Batch arrays are (B, L), B a multiple of `num_micro`;
  each microbatch counts as lying on `num_groups` data-parallel devices in equal parts.
  Where domains are to be compared, layers' sums in the metrics hold what a step needs for it.

  Inside `shard_map` the decoder's `parallel` says which part of the batch is here: the batch is
  this device's, parameters are as they are stored, gradients come as `reducer` makes them,
  metrics are those of all devices, and statistics are of this device's tokens.
  """
  parallel, reducer = decoder.parallel, reducer or NoReduction()
  count_first = counts_first(decoder, num_micro)

  def gradients(
    params: Params, batch: Batch, keys: Keys
  ) -> tuple[Params, Metrics, Statistics]:
    valid_BL, labels_BL = batch["segment"] > 0, batch["labels"]
    totals = LossPieces(decoder).totals(valid_BL, labels_BL, num_micro, num_groups)
    micro = jax.tree.map(lambda x: x.reshape(num_micro, -1, *x.shape[1:]), batch)
    if count_first:
      totals = dataclasses.replace(totals, whole=_count(decoder, params, micro, keys))
    share = jax.value_and_grad(functools.partial(_loss, decoder, compare), has_aux=True)

    def one(
      running: Sums, batch: Batch, index: jax.Array | int
    ) -> tuple[Params, Metrics, Statistics]:
      known = dataclasses.replace(totals, running=running)
      here = parallel.row_group() * num_micro + index
      (_, (metrics, statistics)), grads = share(params, batch, keys.at(here), known)
      # Those of bfloat16 parameters are bfloat16, in which sums over microbatches lose small ones.
      grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
      return reducer.per_microbatch(grads), metrics, statistics

    if num_micro == 1:
      grads, metrics, statistics = one(totals.running, jax.tree.map(lambda x: x[0], micro), 0)
    else:
      grads, metrics, statistics = _accumulate(one, totals.running, micro, num_micro)
    layers = metrics.pop("layers")
    metrics = {**parallel.psum_tokens(metrics), "layers": layers}
    corrections = balance_corrections(decoder, metrics, count_first)
    metrics = {**metrics, "tokens": totals.tokens, **corrections}
    return reducer.finalize(grads), metrics, statistics

  return gradients


def _loss(
  decoder: Decoder,
  compare: Compare | None,
  params: Params,
  batch: Batch,
  keys: Keys,
  totals: StepTotals,
) -> tuple[jax.Array, tuple[Metrics, Statistics]]:
  """Returns a microbatch's share of the step's loss; its shares of metrics, and its statistics."""
  parallel = decoder.parallel
  tokens = parallel.spread_rows(Tokens.of_batch(batch))
  if compare is not None:
    tokens = dataclasses.replace(tokens, domain=batch["domain"], compare=compare)
  params = decoder.parallel.gather_params(params)
  total, metrics = LossPieces(decoder)(params, tokens, batch["labels"], keys, totals)
  statistics = map_layers(lambda of_layer: of_layer.statistics, metrics["layers"])
  metrics = {**metrics, "layers": without(metrics["layers"], "per_sequence", "statistics")}
  return total / parallel.tensor_size, (metrics, statistics)


def _accumulate(
  one: Callable[..., tuple[Params, Metrics, Statistics]], zeros: Sums, micro: Batch, num_micro: int
) -> tuple[Params, Metrics, Statistics]:
  """Returns the sums over microbatches, one at a time in memory, and their statistics joined."""

  def body(carry: Any, inputs: Any) -> tuple[Any, Statistics]:
    batch, index = inputs
    total, running = carry
    grads, metrics, statistics = one(running, batch, index)
    running = jax.tree.map(jnp.add, running, router_sums(metrics["layers"]))
    return (jax.tree.map(jnp.add, total, (grads, metrics)), running), statistics

  def joined(leaf_MRT: jax.Array) -> jax.Array:
    leaf = jnp.moveaxis(leaf_MRT, 0, 1)
    return leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:])

  first = jax.tree.map(lambda x: x[0], micro)
  *shapes, _ = jax.eval_shape(one, zeros, first, jnp.zeros((), jnp.int32))
  empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tuple(shapes))
  ((grads, metrics), _), statistics = jax.lax.scan(
    body, (empty, zeros), (micro, jnp.arange(num_micro))
  )
  return grads, metrics, jax.tree.map(joined, statistics)


def _count(decoder: Decoder, params: Params, micro: Batch, keys: Keys) -> Sums:
  """Returns the router sums of the whole step, by a forward pass over the microbatches."""

  def body(total: Sums, inputs: Any) -> tuple[Sums, None]:
    batch, index = inputs
    tokens = decoder.parallel.spread_rows(Tokens.of_batch(batch))
    here = decoder.parallel.row_group() * num_micro + index
    ready = decoder.parallel.gather_params(params)
    x_BLD = decoder.embed(ready, tokens.id)
    _, _, sums = decoder.blocks(ready, x_BLD, tokens, keys=keys.at(here))
    return jax.tree.map(jnp.add, total, router_sums(sums)), None

  num_micro = micro["ids"].shape[0]
  with jax.named_scope("count_choices"):
    sums, _ = jax.lax.scan(body, zero_sums(decoder), (micro, jnp.arange(num_micro)))
  return jax.lax.stop_gradient(decoder.parallel.psum_tokens(sums))


def map_layers(function: Callable[[MoESums], Any], layers: Any) -> Any:
  """Returns `function` of the sums of each MoE layer, by group and position; None elsewhere."""
  return {
    s: {j: None if sums is None else function(sums) for j, sums in blocks.items()}
    for s, blocks in layers.items()
  }


def without(layers: Any, *fields: str) -> Any:
  """Returns the sums of layers with None for these fields."""
  none: dict[str, Any] = dict.fromkeys(fields)
  return map_layers(lambda sums: dataclasses.replace(sums, **none), layers)


def _aux_losses(layers: Layers) -> Iterator[tuple[str, str, Routed, Any]]:
  """Yields layer group, position, layer and loss of every balance loss."""
  for s, blocks in layers.items():
    for j, moe in blocks.items():
      for aux_loss in moe.balance:
        yield s, j, moe, aux_loss


def router_sums(layers: Any) -> Sums:
  """Returns the router's sums of each MoE layer, by group and place."""
  return {
    s: {j: sums.router for j, sums in blocks.items() if sums is not None}
    for s, blocks in layers.items()
  }


def balance_corrections(
  decoder: Decoder, metrics: Metrics, counted: bool,
  over_stages: Callable[[Any], Any] = lambda values: values,
) -> Metrics:
  """Returns what only the sums of the whole step tell: exact values, and errors from them.

  Args:
    decoder: The model.
    metrics: Of the step; layers' sums are those of the layers that are here.
    counted: Whether the exact values were known before the gradient pass.
    over_stages: Sums over the devices that have other layers.
  """
  balance = dict(metrics["balance"])
  exact: dict[str, Any] = {}
  for s, j, layer, aux_loss in _aux_losses(decoder.routed_layers()):
    if aux_loss.scope in ("global", "global_running") and not aux_loss.additive:
      of_layer = jax.vmap(functools.partial(aux_loss.loss, layer=layer))
      value = jnp.sum(of_layer(metrics["layers"][s][j].router))
      exact[aux_loss.name] = exact.get(aux_loss.name, 0.0) + value
  exact = over_stages(exact)
  running = {name for name in exact if name.endswith("_running")}
  if not counted:  # of weight 0: microbatches did not know the whole
    balance.update({name: exact[name] for name in exact.keys() - running})
  errors = {f"{name}_error": balance[name] - exact[name] for name in running}
  return {"balance": balance, **errors}
