"""The loss of a text's last token under other patterns, its past held as it was.

The past is run once, under a stated policy, into a cache; then only the last token is run, a row a
pattern. Nothing is dropped: every dispatcher is replaced by the exact dropless one. This is the
oracle of a single token: a pattern would also change the keys and values that later tokens see,
which a joint search would have to weigh (Duo-LLM, Alizadeh et al. 2024, section 4).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.param_names import by_layer
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.transformer import Decoder, Params, TransformerConfig
from jaxmoe.moe.dispatch import Dropless
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.routing_oracle.patterns import SKIP, Patterns
from jaxmoe.train.routing_record import choices_of


@dataclasses.dataclass(frozen=True)
class LastToken:
  """Frozen weights and what may be chosen.

  Attributes:
    decoder: The model, made by `of`.
    params: Its parameters.
    patterns: What may be chosen.
    slots: The longest text.
    chunk: Patterns run at a time.
    policy: The kind that the past is run with in every layer; None for the router's own choices.
  """

  decoder: Decoder
  params: Params
  patterns: Patterns
  slots: int
  chunk: int = 256
  policy: int | None = None

  @classmethod
  def of(cls, decoder: Decoder, params: Params, patterns: Patterns, **how: Any) -> LastToken:
    """Returns it over a decoder that drops nothing."""
    return cls(Decoder(_dropless(decoder.config), decoder.vocab_size), params, patterns, **how)

  def at(self, ids_N: np.ndarray, labels: tuple[int, ...]) -> Text:
    """Returns the losses of one text, whose last token is followed by each of `labels` in turn."""
    tokens = self._tokens(ids_N[:-1])
    caches = _remember(self.decoder, self.slots, self.params, tokens)
    last = (jnp.int32(ids_N[-1]), jnp.int32(len(ids_N) - 1), jnp.asarray(labels, jnp.int32))
    return Text(self, caches, last)

  def again(self, ids_N: np.ndarray, label: int, pattern_L: np.ndarray) -> float:
    """Returns the loss of a pattern from one pass over the whole text, without a cache."""
    tokens = self._tokens(ids_N)
    if tokens.replayed_experts is None:
      chosen = _routes(self.decoder, self.params, tokens)
      tokens = dataclasses.replace(tokens, replayed_experts=chosen)
    assert tokens.replayed_experts is not None
    here = self.patterns.replayed_experts(pattern_L[None])[:, 0, 0]
    replayed_experts = tokens.replayed_experts.at[:, 0, len(ids_N) - 1].set(here)
    tokens = dataclasses.replace(tokens, replayed_experts=replayed_experts)
    return float(_whole(self.decoder, self.params, tokens, jnp.int32(len(ids_N) - 1), label))

  def _tokens(self, ids: np.ndarray) -> Tokens:
    """Returns one padded row under the policy."""
    padded = np.zeros((1, self.slots), np.int32)
    padded[0, : len(ids)] = ids
    tokens = Tokens.of_ids(jnp.asarray(padded))
    segment = (tokens.slot < len(ids)).astype(jnp.int32)
    if self.policy is None:
      return dataclasses.replace(tokens, segment=segment)
    replayed_experts = np.full((self.patterns.num_layers, 1, self.slots, 1), SKIP, np.int32)
    replayed_experts[list(self.patterns.depths)] = self.policy
    return dataclasses.replace(
      tokens, segment=segment, replayed_experts=jnp.asarray(replayed_experts)
    )


@dataclasses.dataclass(frozen=True)
class Text:
  """One text: its past in a cache, and its last token."""

  lead: LastToken
  caches: Any
  last: tuple[jax.Array, jax.Array, jax.Array]

  def losses(self, patterns_PL: np.ndarray) -> np.ndarray:
    """Returns (P, labels) float64 nats of every pattern."""
    lead, chunk, found = self.lead, self.lead.chunk, []
    for start in range(0, len(patterns_PL), chunk):
      part = patterns_PL[start : start + chunk]
      full = part[np.minimum(np.arange(chunk), len(part) - 1)]  # one shape, one program
      replayed_experts = jnp.asarray(lead.patterns.replayed_experts(full))
      losses, _ = _last(lead.decoder, lead.params, self.caches, self.last, replayed_experts)
      found.append(np.asarray(losses, np.float64)[: len(part)])
    return np.concatenate(found)

  def router(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the experts (L,) that the model's own routers take, -1 for none, and the losses."""
    lead = self.lead
    losses, expert_L = _last(lead.decoder, lead.params, self.caches, self.last, None)
    return np.asarray(expert_L), np.asarray(losses, np.float64)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _remember(decoder: Decoder, slots: int, params: Params, tokens: Tokens) -> Any:
  return decoder.hidden(params, tokens, decoder.empty_caches(1, slots))[1]


@functools.partial(jax.jit, static_argnums=0)
def _last(
  decoder: Decoder, params: Params, caches: Any, last: Any, replayed_experts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Returns (P, labels) nats and the experts (L,) of the first row."""
  id, position, labels = last
  rows = 1 if replayed_experts is None else replayed_experts.shape[1]
  full = lambda value: jnp.full((rows, 1), value, jnp.int32)  # noqa: E731
  tokens = Tokens(
    full(id), full(position), full(1), full(position), replayed_experts, return_routing=True
  )
  caches = jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf, (leaf.shape[0], rows, *leaf.shape[2:])), caches
  )
  hidden, _, sums = decoder.hidden(params, tokens, caches)
  logp_PV = jax.nn.log_softmax(decoder.logits(params, hidden)[:, 0])
  layers = by_layer(sums, decoder.layer_groups)
  first = [of.routing for _, of in sorted(layers.items())]
  expert_L = jnp.stack([jnp.where(of.valid_TA, of.expert_TA, SKIP)[0, 0] for of in first])
  return -logp_PV[:, labels], expert_L


@functools.partial(jax.jit, static_argnums=0)
def _routes(decoder: Decoder, params: Params, tokens: Tokens) -> jax.Array:
  """Returns the routers' choices as `Tokens.replayed_experts`."""
  return choices_of(decoder, params, dataclasses.replace(tokens, return_routing=True)).astype(
    jnp.int32
  )


@functools.partial(jax.jit, static_argnums=0)
def _whole(
  decoder: Decoder, params: Params, tokens: Tokens, at: jax.Array, label: jax.Array
) -> jax.Array:
  hidden, _, _ = decoder.hidden(params, tokens)
  return -jax.nn.log_softmax(decoder.logits(params, hidden[:, at][:, None])[0, 0])[label]


def _dropless(model: TransformerConfig) -> TransformerConfig:
  """Returns the record with every dispatcher the one that drops nothing."""
  return model.map_ffns(
    lambda ffn: dataclasses.replace(ffn, dispatch=Dropless()) if isinstance(ffn, MoEConfig) else ffn
  )
