"""GShard's dispatch: one-hot masks (T, E, C) and two einsums (arXiv:2006.16668, section 3.2).

An oracle in plain sight: no gather, no scatter, O(T * E * C) memory and O(T * E * C * D) time. It
equals `Capacity` with the policy `position`. Algorithm 1 there places all first choices before all
second ones; that lets a later token push out an earlier one, so here all choices of a token are
placed together.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.moe.dispatch.capacity import Limited
from jaxmoe.moe.dispatch.dispatcher import WHOLE, Counts, DispatchContext
from jaxmoe.moe.dispatch.plan import ExpertFunction, Uniform
from jaxmoe.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class Einsum(Limited):
  """A fixed number of rows an expert, moved by products with masks."""

  @jax.named_scope("plan")
  def masks(
    self, routing: Routing, context: DispatchContext = WHOLE
  ) -> tuple[jax.Array, jax.Array]:
    """Returns (T, E, C) float32: 1 where a token has a row, and its weight there."""
    onehot_TAE = jax.nn.one_hot(routing.expert_TA, routing.scores_TE.shape[1])
    onehot_TAE = jnp.where(routing.valid_TA[:, :, None], onehot_TAE, 0)
    weight_TA = jnp.where(routing.valid_TA, routing.weight_TA, 0)
    chosen_TE = jnp.sum(onehot_TAE, axis=1)
    place_TE = (jnp.cumsum(chosen_TE, axis=0) - chosen_TE).astype(jnp.int32)
    # A place of C or more has no row: its one-hot vector is zeros.
    room_TEC = jax.nn.one_hot(place_TE, self.rows_for(routing, context))
    dispatch_TEC = room_TEC * chosen_TE[:, :, None]
    weight_TE = jnp.sum(onehot_TAE * weight_TA[:, :, None], axis=1)
    return dispatch_TEC, room_TEC * weight_TE[:, :, None]

  def run(
    self, x_TD: jax.Array, routing: Routing, experts: ExpertFunction, context: DispatchContext
  ) -> tuple[jax.Array, Counts]:
    """Returns (T, D) and the drops; the products with masks are float32."""
    dispatch_TEC, combine_TEC = self.masks(routing, context)
    num_experts, capacity = dispatch_TEC.shape[1:]
    used_T1 = jnp.any(dispatch_TEC > 0, axis=(1, 2))[:, None]
    with jax.named_scope("move"):  # What a token without a row holds is not to be multiplied by 0.
      x_TD = jnp.where(used_T1, x_TD, jnp.zeros((), x_TD.dtype))
      rows_ECD = jnp.einsum("tec,td->ecd", dispatch_TEC, x_TD.astype(jnp.float32))
    sizes_E = jnp.sum(dispatch_TEC, axis=(0, 2)).astype(jnp.int32)
    groups = Uniform(sizes_E, capacity, _values_of_rows(dispatch_TEC, routing))
    with jax.named_scope("experts"):
      rows_RD = rows_ECD.reshape(num_experts * capacity, -1).astype(x_TD.dtype)
      out_RD = experts(rows_RD, groups).astype(jnp.float32)
    with jax.named_scope("combine"):
      out_ECD = out_RD.reshape(rows_ECD.shape)
      y_TD = jnp.einsum("tec,ecd->td", combine_TEC, out_ECD).astype(x_TD.dtype)
    dropped = jnp.sum(routing.valid_TA.astype(jnp.float32)) - jnp.sum(dispatch_TEC)
    return y_TD, Counts({"capacity": dropped}, {})


def _values_of_rows(dispatch_TEC: jax.Array, routing: Routing) -> dict[str, jax.Array]:
  """Returns what weights ask of each row's token, (E * C, ...) by name."""
  used_EC = jnp.any(dispatch_TEC > 0, axis=0)
  token_EC = jnp.where(used_EC, jnp.argmax(dispatch_TEC, axis=0), dispatch_TEC.shape[0])
  token_R = token_EC.reshape(-1)
  return {
    name: value_T.at[token_R].get(mode="fill", fill_value=0)
    for name, value_T in routing.values.items()
  }
