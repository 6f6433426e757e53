"""Stick-breaking attention written out."""

import jax
import jax.numpy as jnp

from jaxmoe.ops.attention.masked_softmax import mix, scores
from jaxmoe.ops.attention.sight import Sight
from jaxmoe.ops.stick_breaking.stick_part import StickPart


def reference(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKP: jax.Array, sight: Sight) -> StickPart:
  """Returns A v, and what is left; keys stand in order of time, and hidden ones take nothing.

  Sums of logarithms are float32, from the last key. Holds (B, N, L, S) float32.
  """
  score_BKGLS, mask_BKGLS = scores(q_BLNH, k_BSKH, v_BSKP, sight)
  score_BKGLS = jnp.where(mask_BKGLS, score_BKGLS, 0.0)
  # The logarithm of what a key leaves, 1 - beta; a hidden one leaves all.
  left_BKGLS = jnp.where(mask_BKGLS, jax.nn.log_sigmoid(-score_BKGLS), 0.0)
  left_BLN = jnp.moveaxis(jnp.sum(left_BKGLS, axis=-1), 3, 1).reshape(q_BLNH.shape[:3])
  # Shifted, not less the own term: a difference of large sums would lose the near keys.
  after_BKGLS = jnp.pad(left_BKGLS[..., 1:], [(0, 0)] * 4 + [(0, 1)])
  after_BKGLS = jax.lax.cumsum(after_BKGLS, axis=4, reverse=True)
  share_BKGLS = jnp.exp(jax.nn.log_sigmoid(score_BKGLS) + after_BKGLS)
  return StickPart(mix(jnp.where(mask_BKGLS, share_BKGLS, 0.0), v_BSKP, q_BLNH), left_BLN)
