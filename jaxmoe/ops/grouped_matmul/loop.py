"""The plain oracle: every slot multiplies every row, and keeps its own."""

import jax
import jax.numpy as jnp


def loop(rows_RD: jax.Array, weight_SDF: jax.Array, sizes_S: jax.Array) -> jax.Array:
  """Returns each row times its slot's matrix, at S times the needed FLOPs."""
  ends_S = jnp.cumsum(sizes_S)
  row_R = jnp.arange(rows_RD.shape[0])

  def add_slot(out_RF: jax.Array, slot: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    weight_DF, start, end = slot
    mine_R = (row_R >= start) & (row_R < end)
    kept_RD = jnp.where(mine_R[:, None], rows_RD, jnp.zeros((), rows_RD.dtype))
    product_RF = jnp.dot(kept_RD, weight_DF, preferred_element_type=jnp.float32)
    return out_RF + jnp.where(mine_R[:, None], product_RF, 0.0), None

  zeros_RF = jnp.zeros((rows_RD.shape[0], weight_SDF.shape[-1]), jnp.float32)
  out_RF, _ = jax.lax.scan(add_slot, zeros_RF, (weight_SDF, ends_S - sizes_S, ends_S))
  return out_RF.astype(rows_RD.dtype)
