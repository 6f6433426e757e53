"""SparseMixer-v2: experts are drawn, and the gate gets a gradient as if all had been computed.

GRIN (Liu et al. 2024, arXiv:2409.12136, section 2), as Phi-3.5-MoE has it. The first expert is
drawn from a softmax over those near the best, the second alike over all but the first. What f, the
rest of the model, would lose without the expert of weight m, f(m) - f(0), is an integral of f' from
0 to m, for which Heun's rule takes f'(m / 3) with weight 3/4 and f'(m) with 1/4: so the forward
pass multiplies by m / 3 or m by chance, while the gradient passes to m as it is.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.moe.routers.router import Router, RouterInputs, Selection


@dataclasses.dataclass(frozen=True)
class SparseMixer(Router):
  """Two draws in training, the two best without keys; `score` serves balance losses alone.

  Attributes:
    band: Experts take part in a draw if their logit z lies within 2 band max(|z|, best) of the
      best logit (r of the paper).
  """

  normalize: bool = False
  band: float = 0.01

  fixed_active: ClassVar[int | None] = 2
  draws: ClassVar[bool] = True

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.normalize:
      raise InputError(
        "SparseMixer's weights belong to two draws and have no common sum: normalize=True; "
        "set normalize=false"
      )
    if self.band < 0:
      raise InputError(f"band must not be negative: band={self.band}; 0.01 is usual")

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes each token by itself."""
    open_TE = jnp.ones(inputs.logits_TE.shape, bool)
    first_T, first_weight_T = self._pick(inputs, open_TE, "first")
    open_TE = open_TE & (jnp.arange(open_TE.shape[1])[None] != first_T[:, None])
    second_T, second_weight_T = self._pick(inputs, open_TE, "second")
    weight_TA = jnp.stack([first_weight_T, second_weight_T], axis=1)
    return Selection(jnp.stack([first_T, second_T], axis=1), weight_TA * self.scale)

  def weights_of_replayed(
    self, inputs: RouterInputs, expert_TA: jax.Array, valid_TA: jax.Array
  ) -> jax.Array:
    """Returns each expert's share of those near the best, one after the other, as in `select`."""
    open_TE, weights = jnp.ones(inputs.logits_TE.shape, bool), []
    for expert_T in expert_TA.T:
      weights.append(_of(jax.nn.softmax(self._near(inputs, open_TE), axis=1), expert_T))
      open_TE = open_TE & (jnp.arange(open_TE.shape[1])[None] != expert_T[:, None])
    return jnp.where(valid_TA, jnp.stack(weights, axis=1) * self.scale, 0)

  def _near(self, inputs: RouterInputs, open_TE: jax.Array) -> jax.Array:
    """Returns the logits of open experts near the best of them, -inf elsewhere."""
    held_TE = jax.lax.stop_gradient(inputs.logits_TE)
    best_T1 = jnp.max(jnp.where(open_TE, held_TE, -jnp.inf), axis=1, keepdims=True)
    # A product, since the usual quotient is 0 / 0 where all logits are 0.
    far_TE = best_T1 - held_TE > 2 * self.band * jnp.maximum(jnp.abs(held_TE), best_T1)
    return jnp.where(open_TE & ~far_TE, inputs.logits_TE, -jnp.inf)

  def _pick(
    self, inputs: RouterInputs, open_TE: jax.Array, name: str
  ) -> tuple[jax.Array, jax.Array]:
    """Returns (T,) int32 and float32: an open expert of each token and its weight."""
    near_TE = self._near(inputs, open_TE)
    share_TE = jax.nn.softmax(near_TE, axis=1)
    best_T = jnp.argmax(near_TE, axis=1)
    if inputs.keys is None:
      return best_T.astype(jnp.int32), _of(share_TE, best_T)
    inputs = dataclasses.replace(inputs, keys=inputs.keys / name)
    drawn_T = jnp.argmax(near_TE + inputs.draw("draw", jax.random.gumbel, near_TE.shape[1]), axis=1)
    whole_T = (drawn_T == best_T) | (inputs.draw("heun", jax.random.uniform) > 0.75)
    weight_T = _of(share_TE, drawn_T)
    third_T = jax.lax.stop_gradient(jnp.where(whole_T, 0, weight_T * (1 / 3 - 1)))
    return drawn_T.astype(jnp.int32), weight_T + third_T


def _of(share_TE: jax.Array, expert_T: jax.Array) -> jax.Array:
  return jnp.take_along_axis(share_TE, expert_T[:, None], axis=1)[:, 0]
