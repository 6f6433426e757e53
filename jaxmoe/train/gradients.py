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

from jaxmoe.core.metrics import Mean
from jaxmoe.core.parallel_context import ParallelContext
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Compare, Tokens
from jaxmoe.models.transformer import Decoder, Params, Routed
from jaxmoe.moe.balance import Reference
from jaxmoe.moe.layer import MoESums
from jaxmoe.moe.routers import Adaptive
from jaxmoe.moe.routing import RouterSums

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
Layers = dict[str, dict[str, Routed]]
Sums = dict[str, dict[str, Any]]
Statistics = dict[str, dict[str, Any]]
"""What buffers of routers are updated from, of each token; by place as `Sums`."""
Gradients = Callable[[Params, Batch, Keys], tuple[Params, Metrics, Statistics]]


@dataclasses.dataclass(frozen=True)
class Whole:
  """What each microbatch knows of the whole step.

  Attributes:
    labels: float32, the number of scored labels, at least 1.
    tokens: float32, the number of valid tokens.
    rows: float32, the number of rows that hold a valid token.
    num_micro: The number of microbatches.
    num_groups: On how many data-parallel devices a microbatch lies.
    sums: Router sums of the whole step by layer group and position, stacked over repeats, or None.
    running: Those of the earlier microbatches.
  """

  labels: jax.Array
  tokens: jax.Array
  rows: jax.Array
  num_micro: int
  num_groups: int
  sums: Sums | None
  running: Sums


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
    zeros = _zero_sums(decoder)
    valid_BL = batch["segment"] > 0
    labels, tokens, rows = parallel.psum_tokens(
      tuple(
        jnp.sum(counted).astype(jnp.float32)
        for counted in (batch["labels"] >= 0, valid_BL, jnp.any(valid_BL, axis=1))
      )
    )
    labels = jnp.maximum(labels, 1)
    micro = jax.tree.map(lambda x: x.reshape(num_micro, -1, *x.shape[1:]), batch)
    sums = _count(decoder, params, micro, keys) if count_first else None
    whole = Whole(labels, tokens, rows, num_micro, num_groups, sums, zeros)
    share = jax.value_and_grad(functools.partial(_loss, decoder, compare), has_aux=True)

    def one(
      running: Sums, batch: Batch, index: jax.Array | int
    ) -> tuple[Params, Metrics, Statistics]:
      known = dataclasses.replace(whole, running=running)
      here = parallel.token_group() * num_micro + index
      (_, (metrics, statistics)), grads = share(params, batch, keys.at(here), known)
      # Those of bfloat16 parameters are bfloat16, in which sums over microbatches lose small ones.
      grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
      return reducer.per_microbatch(grads), metrics, statistics

    if num_micro == 1:
      grads, metrics, statistics = one(zeros, jax.tree.map(lambda x: x[0], micro), 0)
    else:
      grads, metrics, statistics = _accumulate(one, zeros, micro, num_micro)
    layers = metrics.pop("layers")
    metrics = {**parallel.psum_tokens(metrics), "layers": layers}
    corrections = _corrections(decoder, metrics, count_first)
    metrics = {**metrics, "tokens": tokens, **corrections}
    return reducer.finalize(grads), metrics, statistics

  return gradients


def _loss(
  decoder: Decoder, compare: Compare | None, params: Params, batch: Batch, keys: Keys, whole: Whole
) -> tuple[jax.Array, tuple[Metrics, Statistics]]:
  """Returns a microbatch's share of the step's loss; its shares of metrics, and its statistics."""
  tokens, parallel = Tokens.of_batch(batch), decoder.parallel
  if compare is not None:
    tokens = dataclasses.replace(tokens, domain=batch["domain"], compare=compare)
  params = decoder.outside(params)
  hidden_BLD, _, sums = decoder.hidden(params, tokens, keys=keys)
  sums = map_layers(lambda of_layer: _of_all(of_layer, parallel), sums)
  with jax.named_scope("loss"):
    nll_BL = decoder.nll(params, hidden_BLD, batch["labels"])
    nll = Mean.of(nll_BL, batch["labels"] >= 0)
  total = nll.sum / whole.labels
  balance: dict[str, Any] = {}
  for s, j, layer, aux_loss in _aux_losses(decoder.routed_layers()):
    known = None if whole.sums is None else whole.sums[s][j]
    share, weighted = _balance(aux_loss, layer, whole, sums[s][j], known, whole.running[s][j])
    if not aux_loss.per_sequence:  # every token group has it
      share, weighted = share / parallel.num_token_groups, weighted / parallel.num_token_groups
    balance[aux_loss.name] = balance.get(aux_loss.name, 0.0) + share
    total = total + weighted
  statistics = map_layers(lambda of_layer: of_layer.statistics, sums)
  layers = without(sums, "per_sequence", "statistics")
  metrics = {"loss": nll, "total_loss": total, "balance": balance, "layers": layers}
  return total / parallel.tensor_size, (metrics, statistics)


def _of_all(sums: MoESums, parallel: ParallelContext) -> MoESums:
  """Returns a layer's sums over the tokens of all devices; by row, and statistics, of this."""
  mine = dataclasses.replace(sums, per_sequence=None, statistics=None, routing=None)
  return dataclasses.replace(
    parallel.psum_tokens(mine), per_sequence=sums.per_sequence, statistics=sums.statistics
  )


@jax.named_scope("balance")
def _balance(
  aux_loss: Any, layer: Routed, whole: Whole, sums: MoESums, known: Any, running: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns a balance loss summed over the repeats of a pattern's position, and times weights."""

  def of_layer(sums: Any, per_sequence: Any, known: Any, running: Any) -> tuple[Any, Any]:
    reference = Reference(
      whole.tokens, whole.rows, whole.num_micro, whole.num_groups, known, running
    )
    share = aux_loss.share(sums, per_sequence, reference, layer)
    return share, aux_loss.weight_of(sums) * share

  shares_R, weighted_R = jax.vmap(of_layer)(sums.router, sums.per_sequence, known, running)
  return jnp.sum(shares_R), jnp.sum(weighted_R)


def _accumulate(
  one: Callable[..., tuple[Params, Metrics, Statistics]], zeros: Sums, micro: Batch, num_micro: int
) -> tuple[Params, Metrics, Statistics]:
  """Returns the sums over microbatches, one at a time in memory, and their statistics joined."""

  def body(carry: Any, inputs: Any) -> tuple[Any, Statistics]:
    batch, index = inputs
    total, running = carry
    grads, metrics, statistics = one(running, batch, index)
    running = jax.tree.map(jnp.add, running, _router_sums(metrics["layers"]))
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
    tokens = Tokens.of_batch(batch)
    here = decoder.parallel.token_group() * num_micro + index
    ready = decoder.outside(params)
    x_BLD = decoder.embed(ready, tokens.id)
    _, _, sums = decoder.blocks(ready, x_BLD, tokens, keys=keys.at(here))
    return jax.tree.map(jnp.add, total, _router_sums(sums)), None

  num_micro = micro["ids"].shape[0]
  with jax.named_scope("count_choices"):
    sums, _ = jax.lax.scan(body, _zero_sums(decoder), (micro, jnp.arange(num_micro)))
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


def _zero_sums(decoder: Decoder) -> Sums:
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


def _router_sums(layers: Any) -> Sums:
  return {
    s: {j: sums.router for j, sums in blocks.items() if sums is not None}
    for s, blocks in layers.items()
  }


def _corrections(decoder: Decoder, metrics: Metrics, counted: bool) -> Metrics:
  """Returns what only the sums of the whole step tell: exact values, and errors from them."""
  balance = dict(metrics["balance"])
  exact: dict[str, Any] = {}
  for s, j, layer, aux_loss in _aux_losses(decoder.routed_layers()):
    if aux_loss.scope in ("global", "global_running") and not aux_loss.additive:
      of_layer = jax.vmap(functools.partial(aux_loss.loss, layer=layer))
      value = jnp.sum(of_layer(metrics["layers"][s][j].router))
      exact[aux_loss.name] = exact.get(aux_loss.name, 0.0) + value
  running = {name for name in exact if name.endswith("_running")}
  if not counted:  # of weight 0: microbatches did not know the whole
    balance.update({name: exact[name] for name in exact.keys() - running})
  errors = {f"{name}_error": balance[name] - exact[name] for name in running}
  return {"balance": balance, **errors}
