"""Moving rows by one gather, which fills rows without a token with zeros."""

import jax


def gather(values_TF: jax.Array, token_R: jax.Array) -> jax.Array:
  """Returns (R, ...): the token's values of each row."""
  return values_TF.at[token_R].get(mode="fill", fill_value=0)
