"""The gradient of a step's loss, whole or accumulated over microbatches: the same numbers.

Token losses are divided by the labels of the whole step, and balance losses are given what they
must know of it (`moe/balance.py`), so that the microbatches' losses, gradients and metrics are
shares that add up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.metrics import Mean
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.moe.balance import LoadBalance, Reference, load_balance
from jaxmoe.moe.layer import MoE, MoESums

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
Layers = dict[str, dict[str, MoE]]
Counts = dict[str, dict[str, Any]]
Gradients = Callable[[Params, Batch, Keys], tuple[Params, Metrics]]


@dataclasses.dataclass(frozen=True)
class Whole:
  """What each microbatch knows of the whole step.

  Attributes:
    labels: float32, the number of scored labels, at least 1.
    tokens: float32, the number of valid tokens.
    counts: Choices of the whole step by segment and position, (repeats, E), or None.
    running: Choices of the earlier microbatches, likewise.
  """

  labels: jax.Array
  tokens: jax.Array
  counts: Counts | None
  running: Counts


def counts_first(decoder: Decoder, num_micro: int) -> bool:
  """Whether a step runs a forward pass for the counts before its gradient pass."""
  terms = (term for _, _, term in _terms(decoder.moe_layers()))
  return num_micro > 1 and any(term.needs_counts and term.weight > 0 for term in terms)


def make_gradients(decoder: Decoder, num_micro: int) -> Gradients:
  """Returns the function from parameters, batch and keys to the gradient and the metrics.

  The loss is the mean negative log-likelihood in nats over scored labels, plus the weighted
  balance losses summed over MoE layers. Batch arrays are (B, L), B a multiple of `num_micro`.
  """
  count_first = counts_first(decoder, num_micro)

  def gradients(params: Params, batch: Batch, keys: Keys) -> tuple[Params, Metrics]:
    zeros = _zero_counts(decoder)
    labels = jnp.maximum(jnp.sum(batch["labels"] >= 0), 1).astype(jnp.float32)
    tokens = jnp.sum(batch["segment"] > 0).astype(jnp.float32)
    micro = jax.tree.map(lambda x: x.reshape(num_micro, -1, *x.shape[1:]), batch)
    counts = _count(decoder, params, micro, keys) if count_first else None
    whole = Whole(labels, tokens, counts, zeros)
    share = jax.value_and_grad(functools.partial(_loss, decoder, num_micro), has_aux=True)

    def one(running: Counts, batch: Batch, index: jax.Array | int) -> tuple[Params, Metrics]:
      known = dataclasses.replace(whole, running=running)
      (_, metrics), grads = share(params, batch, keys.at(index), known)
      return grads, metrics

    if num_micro == 1:
      grads, metrics = one(zeros, jax.tree.map(lambda x: x[0], micro), 0)
    else:
      grads, metrics = _accumulate(one, zeros, micro, num_micro)
    corrections = _corrections(decoder, metrics, tokens, count_first)
    return grads, {**metrics, "tokens": tokens, **corrections}

  return gradients


def _loss(
  decoder: Decoder, num_micro: int, params: Params, batch: Batch, keys: Keys, whole: Whole
) -> tuple[jax.Array, Metrics]:
  """Returns a microbatch's share of the step's loss, and its shares of the metrics."""
  tokens = Tokens.of_batch(batch)
  hidden_BLD, _, sums = decoder.hidden(params, tokens, keys=keys)
  with jax.named_scope("loss"):
    nll_BL = decoder.nll(params, hidden_BLD, batch["labels"])
    nll = Mean.of(nll_BL, batch["labels"] >= 0)
  total = nll.sum / whole.labels
  balance: dict[str, Any] = {}
  for s, j, term in _terms(decoder.moe_layers()):
    counts = None if whole.counts is None else whole.counts[s][j]
    share = _balance(term, num_micro, whole.tokens, sums[s][j], counts, whole.running[s][j])
    balance[term.name] = balance.get(term.name, 0.0) + share
    total = total + term.weight * share
  return total, {"loss": nll, "total_loss": total, "balance": balance, "layers": sums}


@jax.named_scope("balance")
def _balance(
  term: Any,
  num_micro: int,
  tokens: jax.Array,
  sums: MoESums,
  counts_RE: jax.Array | None,
  running_RE: jax.Array,
) -> jax.Array:
  """Returns a balance loss summed over the R repeats that one pattern position stands for."""

  def of_layer(sums: Any, counts_E: Any, running_E: jax.Array) -> jax.Array:
    return term.loss(sums, Reference(tokens, num_micro, counts_E, running_E))

  return jnp.sum(jax.vmap(of_layer)(sums.router, counts_RE, running_RE))


def _accumulate(
  one: Callable[..., tuple[Params, Metrics]], zeros: Counts, micro: Batch, num_micro: int
) -> tuple[Params, Metrics]:
  """Returns the summed gradients and metrics of all microbatches, one at a time in memory."""

  def body(carry: Any, inputs: Any) -> tuple[Any, None]:
    batch, index = inputs
    (grads, metrics), running = carry
    new_grads, new_metrics = one(running, batch, index)
    running = jax.tree.map(jnp.add, running, _router_counts(new_metrics["layers"]))
    return (jax.tree.map(jnp.add, (grads, metrics), (new_grads, new_metrics)), running), None

  first = jax.tree.map(lambda x: x[0], micro)
  shapes = jax.eval_shape(one, zeros, first, jnp.zeros((), jnp.int32))
  empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  ((grads, metrics), _), _ = jax.lax.scan(body, (empty, zeros), (micro, jnp.arange(num_micro)))
  return grads, metrics


def _count(decoder: Decoder, params: Params, micro: Batch, keys: Keys) -> Counts:
  """Returns the choices of the whole step, by a forward pass over the microbatches."""

  def body(counts: Counts, inputs: Any) -> tuple[Counts, None]:
    batch, index = inputs
    tokens = Tokens.of_batch(batch)
    x_BLD = decoder.embed(params, tokens.id)
    _, _, sums = decoder.blocks(params, x_BLD, tokens, keys=keys.at(index))
    return jax.tree.map(jnp.add, counts, _router_counts(sums)), None

  num_micro = micro["ids"].shape[0]
  with jax.named_scope("count_choices"):
    counts, _ = jax.lax.scan(body, _zero_counts(decoder), (micro, jnp.arange(num_micro)))
  return jax.lax.stop_gradient(counts)


def _terms(layers: Layers) -> Iterator[tuple[str, str, Any]]:
  """Yields segment, position and term of every balance loss."""
  for s, blocks in layers.items():
    for j, moe in blocks.items():
      for term in moe.balance:
        yield s, j, term


def _zero_counts(decoder: Decoder) -> Counts:
  repeats = {str(s): segment.repeats for s, segment in enumerate(decoder.config.stack)}
  return {
    s: {j: jnp.zeros((repeats[s], moe.num_experts)) for j, moe in blocks.items()}
    for s, blocks in decoder.moe_layers().items()
  }


def _router_counts(layers: Any) -> Counts:
  return {
    s: {j: sums.router.counts_E for j, sums in blocks.items() if sums is not None}
    for s, blocks in layers.items()
  }


def _exact_balance(decoder: Decoder, metrics: Metrics, tokens: jax.Array, name: str) -> Any:
  """Returns the load-balancing loss over the whole step, of the layers with a term `name`."""
  exact = None
  for s, j, term in _terms(decoder.moe_layers()):
    if term.name == name:
      sums = metrics["layers"][s][j].router
      layer_loss = jax.vmap(load_balance, (0, 0, None))
      loss = jnp.sum(layer_loss(sums.counts_E, sums.scores_E, tokens))
      exact = loss if exact is None else exact + loss
  return exact


def _corrections(
  decoder: Decoder, metrics: Metrics, tokens: jax.Array, counted: bool
) -> Metrics:
  """Returns what only the sums of the whole step tell: exact values, and errors from them."""
  running, exactly = (LoadBalance(scope=scope).name for scope in ("global_running", "global"))
  balance = dict(metrics["balance"])
  if exactly in balance and not counted:  # of weight 0: microbatches did not know the counts
    balance[exactly] = _exact_balance(decoder, metrics, tokens, exactly)
  if running not in balance:
    return {"balance": balance}
  error = balance[running] - _exact_balance(decoder, metrics, tokens, running)
  return {"balance": balance, f"{running}_error": error}
