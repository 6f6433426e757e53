"""The grouped matmul of a capacity layout: every slot owns the same number of rows."""

import jax
import jax.numpy as jnp


def uniform(rows_RD: jax.Array, weight_SDF: jax.Array, rows_per_slot: int) -> jax.Array:
  """Returns rows S*rows_per_slot times their slots' matrices: one batched matmul."""
  num_slots, dim, out_dim = weight_SDF.shape
  if rows_RD.shape[0] != num_slots * rows_per_slot:
    raise ValueError(
      f"rows must be num_slots * rows_per_slot: {rows_RD.shape=} {num_slots=} {rows_per_slot=}"
    )
  rows_SCD = rows_RD.reshape(num_slots, rows_per_slot, dim)
  out_SCF = jnp.einsum("scd,sdf->scf", rows_SCD, weight_SDF, preferred_element_type=jnp.float32)
  return out_SCF.reshape(rows_RD.shape[0], out_dim).astype(rows_RD.dtype)
