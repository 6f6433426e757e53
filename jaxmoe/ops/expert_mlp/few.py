"""The expert layer for few rows, as where a model writes one token at a time.

Each choice reads its own expert and no other, one after the other: FLOPs and weights are those that
the choices need, where padded rows of all experts would cost up to S / A times as much. Whatever
else is in the batch, a row's products are of one row. Gradients are right, and no faster for it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmoe.core.backends import Need
from jaxmoe.ops.grouped_matmul import GroupedMatmul


def few_choices(need: Need) -> str | None:
  """Fits where there are no more choices than experts; it serves more, slowly."""
  choices, num_slots = need.sizes["T"] * need.sizes["A"], need.sizes["S"]
  return f"is for at most {num_slots} choices, there are {choices}" if choices > num_slots else None


def few(
  x_TD: jax.Array,
  gate_up_SDGF: jax.Array,
  down_SFD: jax.Array,
  slot_TA: jax.Array,
  weight_TA: jax.Array,
  activation: Callable[[jax.Array], jax.Array],
  among: int | None = None,
  matmul: GroupedMatmul | None = None,
) -> jax.Array:
  """Returns the layer's output in x.dtype, reading the weights of each choice."""
  del among, matmul
  num_slots, dim, gates, mlp_dim = gate_up_SDGF.shape
  live_TA = slot_TA < num_slots
  flat_SDE = gate_up_SDGF.reshape(num_slots, dim, gates * mlp_dim)

  @jax.checkpoint  # or each choice would keep a copy of its expert for the backward pass
  def choice(_: None, given: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
    row_1D, slot = given
    pre_1E = _dot(row_1D, jax.lax.dynamic_index_in_dim(flat_SDE, slot, keepdims=False))
    hidden_1F = activation(pre_1E.reshape(1, gates, mlp_dim))
    return None, _dot(hidden_1F, jax.lax.dynamic_index_in_dim(down_SFD, slot, keepdims=False))

  # What a token without a row holds is not to be multiplied by 0.
  rows_TAD = jnp.where(live_TA[:, :, None], x_TD[:, None], jnp.zeros((), x_TD.dtype))
  given = rows_TAD.reshape(-1, 1, dim), jnp.where(live_TA, slot_TA, 0).reshape(-1)
  with jax.named_scope("experts"):
    _, out_C1D = jax.lax.scan(choice, None, given)
  with jax.named_scope("combine"):
    out_TAD = out_C1D.reshape(rows_TAD.shape).astype(jnp.float32)
    weight_TA = jnp.where(live_TA, weight_TA.astype(jnp.float32), 0.0)
    total_TD = jnp.zeros(x_TD.shape, jnp.float32)
    for at in range(slot_TA.shape[1]):
      total_TD += out_TAD[:, at] * weight_TA[:, at, None]
  return total_TD.astype(x_TD.dtype)


def _dot(row_1D: jax.Array, weight_DF: jax.Array) -> jax.Array:
  """Returns a product summed in float32 and rounded to the row's dtype."""
  product_1F = jnp.dot(row_1D, weight_DF, preferred_element_type=jnp.float32)
  return product_1F.astype(row_1D.dtype)
