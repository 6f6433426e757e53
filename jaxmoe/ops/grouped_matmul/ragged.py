"""`jax.lax.ragged_dot`: the compiler's own grouped matmul.

On CPU, and on GPUs without a native kernel, XLA computes every slot for every row, so this is a
portable second opinion there and only worth its name where the platform lowers it natively.
"""

import jax
import jax.numpy as jnp


def ragged(rows_RD: jax.Array, weight_SDF: jax.Array, sizes_S: jax.Array) -> jax.Array:
  """Returns each row times its slot's matrix through `jax.lax.ragged_dot`."""
  used_R1 = (jnp.arange(rows_RD.shape[0]) < jnp.sum(sizes_S))[:, None]
  # Rows past the last slot are undefined on some platforms, going in and coming out.
  rows_RD = jnp.where(used_R1, rows_RD, jnp.zeros((), rows_RD.dtype))
  out_RF = jax.lax.ragged_dot(rows_RD, weight_SDF, sizes_S, preferred_element_type=jnp.float32)
  return jnp.where(used_R1, out_RF, 0.0).astype(rows_RD.dtype)
