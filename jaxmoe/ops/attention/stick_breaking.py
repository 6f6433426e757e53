"""Stick-breaking attention written out (ModuleFormer, Shen et al. 2023, section 2.2).

Each query breaks a stick of length 1 along its keys, the last first: key j takes the share
beta_ij = sigmoid(z_ij) of what keys after it have left, A_ij = beta_ij prod_{l>j} (1 - beta_il),
with z_ij = scale q_i k_j and l up to i itself. The shares sum to at most 1. No softmax, and no
positions: the order of keys is all.
"""

import jax
import jax.numpy as jnp

from jaxmoe.ops.attention.masked_softmax import mix, scores


def stick_breaking(
  q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BLS: jax.Array, scale: float
) -> jax.Array:
  """Returns A v, in q's dtype; keys stand in order of time, and hidden ones take nothing.

  Sums of logarithms are float32, from the last key. Holds (B, N, L, S) float32.
  """
  score_BKGLS, mask_BKGLS = scores(q_BLNH, k_BSKH, mask_BLS, scale)
  score_BKGLS = jnp.where(mask_BKGLS, score_BKGLS, 0.0)
  # The logarithm of what a key leaves, 1 - beta; a hidden one leaves all.
  left_BKGLS = jnp.where(mask_BKGLS, jax.nn.log_sigmoid(-score_BKGLS), 0.0)
  # Shifted, not less the own term: a difference of large sums would lose the near keys.
  after_BKGLS = jnp.pad(left_BKGLS[..., 1:], [(0, 0)] * 4 + [(0, 1)])
  after_BKGLS = jax.lax.cumsum(after_BKGLS, axis=4, reverse=True)
  share_BKGLS = jnp.exp(jax.nn.log_sigmoid(score_BKGLS) + after_BKGLS)
  return mix(jnp.where(mask_BKGLS, share_BKGLS, 0.0), v_BSKH, q_BLNH)
