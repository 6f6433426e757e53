"""The loss in chunks of tokens, without ever holding all the logits.

A chunk's logits are computed again in the backward pass instead of being kept. Up to one chunk of
tokens nothing is recomputed: a single piece keeps its logits, which costs as much as the three
products alone; a scan over chunks adds the fourth product.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxmoe.ops.cross_entropy.all_logits import VocabShard, reference


def chunks(
  hidden_TD: jax.Array,
  head_weight: Any,
  spec: str,
  labels_T: jax.Array,
  chunk: int,
  part: VocabShard | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (nll_T, lse_T), of at most `chunk` tokens at a time."""
  chex.assert_rank([hidden_TD, labels_T], [2, 1])
  chex.assert_equal_shape_prefix([hidden_TD, labels_T], 1)
  num_tokens, dim = hidden_TD.shape
  if chunk < 1:
    raise ValueError(f"a chunk holds at least one token: {chunk=}")
  if num_tokens <= chunk:
    return reference(hidden_TD, head_weight, spec, labels_T, chunk, part)
  num_chunks = -(-num_tokens // chunk)
  spare = num_chunks * chunk - num_tokens
  hidden_NCD = jnp.pad(hidden_TD, ((0, spare), (0, 0))).reshape(num_chunks, chunk, dim)
  labels_NC = jnp.pad(labels_T, (0, spare), constant_values=-1).reshape(num_chunks, chunk)
  # The scan itself keeps the compiler from merging the two computations of a chunk's logits.
  recomputed = jax.checkpoint(reference, prevent_cse=False, static_argnums=(2, 4, 5))

  def step(_: None, some: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
    return None, recomputed(some[0], head_weight, spec, some[1], chunk, part)

  _, (nll_NC, lse_NC) = jax.lax.scan(step, None, (hidden_NCD, labels_NC))
  return nll_NC.reshape(-1)[:num_tokens], lse_NC.reshape(-1)[:num_tokens]
