"""The loss from all logits at once: the formula, and what a chunk of tokens goes through."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.weight_formats import dot


@dataclasses.dataclass(frozen=True)
class VocabShard:
  """A head of which each device along mesh axes has as many columns, those of its index.

  Attributes:
    axis: The axis, or axes, outermost first.
    vocab_size: V; columns past it, on the last devices, count for nothing.
  """

  axis: str | tuple[str, ...]
  vocab_size: int


def reference(
  hidden_TD: jax.Array,
  head_weight: Any,
  spec: str,
  labels_T: jax.Array,
  chunk: int,
  part: VocabShard | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (nll_T, lse_T) of tokens whose logits all exist at once."""
  del chunk
  logits_TV = dot(head_weight, hidden_TD.astype(jnp.float32), spec)
  if part is not None:
    return _of_part(logits_TV, labels_T, part)
  lse_T = jax.nn.logsumexp(logits_TV, axis=-1)
  index_T1 = jnp.maximum(labels_T, 0)[:, None]
  # Out of bounds fills with NaN, so a label past the vocabulary cannot pass as a low loss.
  right_T = jnp.take_along_axis(logits_TV, index_T1, axis=-1, mode="fill")[:, 0]
  scored_T = labels_T >= 0
  return jnp.where(scored_T, lse_T - right_T, 0.0), jnp.where(scored_T, lse_T, 0.0)


def _of_part(
  logits_TV: jax.Array, labels_T: jax.Array, part: VocabShard
) -> tuple[jax.Array, jax.Array]:
  """Returns `reference` of all devices' logits, of which this one has some columns."""
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
