"""Combining by a gather of the choices' rows and a sum in order of choice."""

import jax
import jax.numpy as jnp


def gather_sum(rows_RD: jax.Array, row_TA: jax.Array, weight_TA: jax.Array) -> jax.Array:
  """Returns (T, D): each token's rows times their weights, summed in order of choice."""
  choices_TAD = rows_RD.at[row_TA].get(mode="fill", fill_value=0)
  weighted_TAD = choices_TAD.astype(jnp.float32) * weight_TA[:, :, None]
  # An unrolled sum keeps one order of additions, whatever else is in the batch.
  total_TD = weighted_TAD[:, 0]
  for choice in range(1, weighted_TAD.shape[1]):
    total_TD = total_TD + weighted_TAD[:, choice]
  return total_TD.astype(rows_RD.dtype)
