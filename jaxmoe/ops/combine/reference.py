"""Combining token after token, choice after choice, in a loop: the oracle."""

import jax
import jax.numpy as jnp


def reference(rows_RD: jax.Array, row_TA: jax.Array, weight_TA: jax.Array) -> jax.Array:
  """Returns (T, D): each token's rows times their weights, summed in order of choice."""
  num_rows, dim = rows_RD.shape

  def token(given: tuple[jax.Array, jax.Array]) -> jax.Array:
    def add(total_D: jax.Array, choice: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
      row, weight = choice
      row_D = rows_RD[jnp.minimum(row, num_rows - 1)].astype(jnp.float32)
      row_D = jnp.where(row < num_rows, row_D, jnp.zeros((), jnp.float32))
      return total_D + row_D * weight, None

    return jax.lax.scan(add, jnp.zeros(dim, jnp.float32), given)[0]

  return jax.lax.map(token, (row_TA, weight_TA)).astype(rows_RD.dtype)
