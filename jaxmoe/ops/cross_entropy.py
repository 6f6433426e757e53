"""Cross-entropy of the next token from hidden states, without ever holding all the logits.

The loss takes the head's weight instead of logits, so it decides how many exist at once: tokens go
through the head in chunks, and a chunk's logits are computed again in the backward pass instead of
being kept. Up to one chunk of tokens nothing is recomputed: a single piece keeps its logits, which
costs as much as the three products alone; a scan over chunks adds the fourth product.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxmoe.core.weight_formats import dot


@dataclasses.dataclass(frozen=True)
class VocabShard:
  """A head of which each device along a mesh axis has as many columns, those of its index.

  Attributes:
    axis: The axis.
    vocab_size: V; columns past it, on the last devices, count for nothing.
  """

  axis: str
  vocab_size: int


def cross_entropy(
  hidden_TD: jax.Array,
  head_weight: Any,
  spec: str,
  labels_T: jax.Array,
  chunk: int,
  part: VocabShard | None = None,
) -> jax.Array:
  """Returns each token's negative log probability of its label, 0 where the label is negative.

  Args:
    hidden_TD: The last hidden states, one row a token, already normalized.
    head_weight: The head in any weight format, or a tied embedding.
    spec: The einsum to logits: 'td,dv->tv', or 'td,vd->tv' for an embedding.
    labels_T: The right ids; negative where a token is not scored. Past the vocabulary gives NaN.
    chunk: The most tokens whose logits exist at once.
    part: Where the head's columns lie on several devices, inside `shard_map`; every device gets
      the same (T,). O(T) numbers are exchanged, never logits (Shoeybi et al. 2019, section 3).

  Returns:
    Float32 nats (T,). Logits are float32 for any type of hidden states.
  """
  return cross_entropy_and_lse(hidden_TD, head_weight, spec, labels_T, chunk, part)[0]


def cross_entropy_and_lse(
  hidden_TD: jax.Array,
  head_weight: Any,
  spec: str,
  labels_T: jax.Array,
  chunk: int,
  part: VocabShard | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns `cross_entropy` and each token's log-sum-exp of the logits, for a z-loss.

  Both are 0, with zero gradients, where the label is negative.
  """
  chex.assert_rank([hidden_TD, labels_T], [2, 1])
  chex.assert_equal_shape_prefix([hidden_TD, labels_T], 1)
  num_tokens, dim = hidden_TD.shape
  if chunk < 1:
    raise ValueError(f"a chunk holds at least one token: {chunk=}")
  if num_tokens <= chunk:
    return _piece(hidden_TD, head_weight, spec, labels_T, part)
  num_chunks = -(-num_tokens // chunk)
  spare = num_chunks * chunk - num_tokens
  hidden_NCD = jnp.pad(hidden_TD, ((0, spare), (0, 0))).reshape(num_chunks, chunk, dim)
  labels_NC = jnp.pad(labels_T, (0, spare), constant_values=-1).reshape(num_chunks, chunk)
  # The scan itself keeps the compiler from merging the two computations of a chunk's logits.
  recomputed = jax.checkpoint(_piece, prevent_cse=False, static_argnums=(2, 4))

  def step(_: None, some: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
    return None, recomputed(some[0], head_weight, spec, some[1], part)

  _, (nll_NC, lse_NC) = jax.lax.scan(step, None, (hidden_NCD, labels_NC))
  return nll_NC.reshape(-1)[:num_tokens], lse_NC.reshape(-1)[:num_tokens]


def _piece(
  hidden_TD: jax.Array, head_weight: Any, spec: str, labels_T: jax.Array, part: VocabShard | None
) -> tuple[jax.Array, jax.Array]:
  """Returns (nll_T, lse_T) of tokens whose logits all exist at once."""
  logits_TV = dot(head_weight, hidden_TD.astype(jnp.float32), spec)
  if part is not None:
    return _piece_of_part(logits_TV, labels_T, part)
  lse_T = jax.nn.logsumexp(logits_TV, axis=-1)
  index_T1 = jnp.maximum(labels_T, 0)[:, None]
  # Out of bounds fills with NaN, so a label past the vocabulary cannot pass as a low loss.
  right_T = jnp.take_along_axis(logits_TV, index_T1, axis=-1, mode="fill")[:, 0]
  scored_T = labels_T >= 0
  return jnp.where(scored_T, lse_T - right_T, 0.0), jnp.where(scored_T, lse_T, 0.0)


def _piece_of_part(
  logits_TV: jax.Array, labels_T: jax.Array, part: VocabShard
) -> tuple[jax.Array, jax.Array]:
  """Returns `_piece` of all devices' logits, of which this one has some columns."""
  size = logits_TV.shape[1]
  first = jax.lax.axis_index(part.axis) * size
  column_1V = first + jnp.arange(size)[None]
  logits_TV = jnp.where(column_1V < part.vocab_size, logits_TV, -jnp.inf)
  top_T = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits_TV, axis=-1)), part.axis)
  mass_T = jax.lax.psum(jnp.sum(jnp.exp(logits_TV - top_T[:, None]), axis=-1), part.axis)
  lse_T = top_T + jnp.log(mass_T)
  here_T = (labels_T >= first) & (labels_T < jnp.minimum(first + size, part.vocab_size))
  index_T1 = jnp.where(here_T, labels_T - first, 0)[:, None]
  own_T = jnp.take_along_axis(logits_TV, index_T1, axis=-1)[:, 0]
  # A device without the label adds zero; past the vocabulary there is none that has it.
  known_T = labels_T < part.vocab_size
  right_T = jax.lax.psum(jnp.where(here_T, own_T, jnp.where(known_T, 0.0, jnp.nan)), part.axis)
  scored_T = labels_T >= 0
  return jnp.where(scored_T, lse_T - right_T, 0.0), jnp.where(scored_T, lse_T, 0.0)
