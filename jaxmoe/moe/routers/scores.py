"""Scores: from logits to how much a router thinks of each expert, in float32, each by itself.

To add one, add one line to SCORES.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def softmax(logits_TE: jax.Array) -> jax.Array:
  """Returns shares that sum to 1 over experts (Shazeer et al. 2017, equation 2)."""
  return jax.nn.softmax(logits_TE, axis=-1)


def sigmoid(logits_TE: jax.Array) -> jax.Array:
  """Returns each expert's affinity by itself (DeepSeek-V3, arXiv:2412.19437, equation 15)."""
  return jax.nn.sigmoid(logits_TE)


def sqrt_softplus(logits_TE: jax.Array) -> jax.Array:
  """Returns sqrt(log(1 + e^z)), unbounded and never 0 (DeepSeek-V4)."""
  # Below a logit of -100 softplus is 0, where a root has no finite gradient.
  return jnp.sqrt(jnp.maximum(jax.nn.softplus(logits_TE), 1e-30))


def relu(logits_TE: jax.Array) -> jax.Array:
  """Returns max(z, 0): what is not positive is not chosen (ReMoE, arXiv:2412.14711)."""
  return jax.nn.relu(logits_TE)


SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
  "softmax": softmax,
  "sigmoid": sigmoid,
  "sqrt_softplus": sqrt_softplus,
  "relu": relu,
}
