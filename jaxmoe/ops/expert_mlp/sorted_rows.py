"""The expert layer step by step: rows in order of slot, two grouped matmuls, a weighted sum.

No padding and no overflow: as many rows as there are choices. It is what to take where a platform
has a fast grouped matmul.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmoe.ops.expert_mlp.places import place_rows
from jaxmoe.ops.grouped_matmul import GroupedMatmul, blocks


def sorted_rows(
  x_TD: jax.Array,
  gate_up_SDGF: jax.Array,
  down_SFD: jax.Array,
  slot_TA: jax.Array,
  weight_TA: jax.Array,
  activation: Callable[[jax.Array], jax.Array],
  among: int | None = None,
  matmul: GroupedMatmul = blocks,
) -> jax.Array:
  """Returns the layer's output in x.dtype, from as many rows as there are choices."""
  del among
  num_slots, dim, gates, mlp_dim = gate_up_SDGF.shape
  num_choices, num_active = slot_TA.size, slot_TA.shape[1]
  row_TA, choice_R, sizes_S = place_rows(slot_TA, num_slots)
  with jax.named_scope("move"):
    rows_RD = x_TD.at[choice_R // num_active].get(mode="fill", fill_value=0)
  with jax.named_scope("experts"):
    flat_SDE = gate_up_SDGF.reshape(num_slots, dim, gates * mlp_dim)
    pre_RGF = matmul(rows_RD, flat_SDE, sizes_S).reshape(num_choices, gates, mlp_dim)
    out_RD = matmul(activation(pre_RGF), down_SFD, sizes_S)
  with jax.named_scope("combine"):
    total_TD = jnp.zeros(x_TD.shape, jnp.float32)
    for choice in range(num_active):
      row_T = row_TA[:, choice]
      weight_T = jnp.where(row_T < num_choices, weight_TA[:, choice].astype(jnp.float32), 0.0)
      rows_TD = out_RD.at[row_T].get(mode="fill", fill_value=0)
      total_TD += rows_TD.astype(jnp.float32) * weight_T[:, None]
  return total_TD.astype(x_TD.dtype)
