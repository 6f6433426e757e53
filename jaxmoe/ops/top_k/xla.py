"""The compiler's own search for the highest ranks."""

import jax


def xla(rank_TE: jax.Array, num: int) -> jax.Array:
  """Returns (T, num) int32, through `jax.lax.top_k`."""
  return jax.lax.top_k(jax.lax.stop_gradient(rank_TE), num)[1]
