"""The oracle: every slot computes every token, and a (T, S) matrix of weights picks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmoe.ops.grouped_matmul import GroupedMatmul


def reference(
  x_TD: jax.Array,
  gate_up_SDGF: jax.Array,
  down_SFD: jax.Array,
  slot_TA: jax.Array,
  weight_TA: jax.Array,
  activation: Callable[[jax.Array], jax.Array],
  among: int | None = None,
  matmul: GroupedMatmul | None = None,
) -> jax.Array:
  """Returns the layer's output in x.dtype at S / A times the needed FLOPs."""
  del among, matmul
  num_slots = gate_up_SDGF.shape[0]
  onehot_TAS = jax.nn.one_hot(slot_TA, num_slots, dtype=jnp.float32)
  weight_TA = jnp.where(slot_TA < num_slots, weight_TA.astype(jnp.float32), 0.0)
  weight_TS = jnp.einsum("tas,ta->ts", onehot_TAS, weight_TA, precision="highest")
  f32 = jnp.float32
  pre_STGF = jnp.einsum("td,sdgf->stgf", x_TD, gate_up_SDGF, preferred_element_type=f32)
  hidden_STF = activation(pre_STGF.astype(x_TD.dtype))
  out_STD = jnp.einsum("stf,sfd->std", hidden_STF, down_SFD, preferred_element_type=f32)
  out_STD = out_STD.astype(x_TD.dtype).astype(f32)
  return jnp.einsum("ts,std->td", weight_TS, out_STD, precision="highest").astype(x_TD.dtype)
