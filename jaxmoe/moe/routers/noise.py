"""Noise that lets a token try other experts while training; without keys both rules are top-k."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.weight_formats import dot
from jaxmoe.moe.routers.router import RouterInputs, Selection
from jaxmoe.moe.routers.scores import SCORES
from jaxmoe.moe.routers.topk import TopK


@dataclasses.dataclass(frozen=True)
class Noisy(TopK):
  """The A best of H = x W + N(0, 1) softplus(x W_noise), times their scores in H.

  Shazeer et al. 2017, arXiv:1701.06538, equations 3 to 5; W_noise starts at zero (appendix A).
  With keys the routing holds `load_TE`, without them counts are the load.
  """

  draws: ClassVar[bool] = True

  def parameters(self, init: Init, dim: int, num_experts: int) -> dict[str, nnx.Param]:
    """Returns W_noise."""
    return {"noise": init.zeros((dim, num_experts), ("embed", "expert"))}

  def num_params(self, dim: int, num_experts: int) -> int:
    """Returns the number of the gate's parameters and of W_noise."""
    return super().num_params(dim, num_experts) + dim * num_experts

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes each token by itself."""
    if inputs.keys is None:
      return super().select(inputs)
    deviation_TE = jax.nn.softplus(dot(inputs.parameters["noise"], inputs.x_TD, "td,de->te"))
    normal_TE = inputs.draw("noise", jax.random.normal, deviation_TE.shape[1])
    noisy_TE = inputs.logits_TE + normal_TE * deviation_TE
    expert_TA = inputs.top_k(noisy_TE, inputs.num_active)
    return Selection(
      expert_TA,
      self.combine_weights(SCORES[self.score](noisy_TE), expert_TA),
      load_TE=_load(inputs.logits_TE, noisy_TE, deviation_TE, inputs.num_active),
    )


def _load(
  logits_TE: jax.Array, noisy_TE: jax.Array, deviation_TE: jax.Array, num_active: int
) -> jax.Array:
  """Returns P(x, i) of appendix A: that i is chosen under new noise for i, all other as drawn.

  It is so where i beats the A-th best of the others; gradients pass through that one, too.
  """
  if num_active == logits_TE.shape[1]:
    return jnp.ones_like(logits_TE)
  sorted_TA = jax.lax.top_k(noisy_TE, num_active + 1)[0]
  last_T1, next_T1 = sorted_TA[:, -2:-1], sorted_TA[:, -1:]
  # Of the others: without i, what comes after the chosen ones moves up.
  beat_TE = jnp.where(noisy_TE >= last_T1, next_T1, last_T1)
  # The floor keeps gradients finite where a deviation has died.
  return jax.scipy.special.ndtr((logits_TE - beat_TE) / jnp.maximum(deviation_TE, 1e-6))


@dataclasses.dataclass(frozen=True)
class Gumbel(TopK):
  """The A best of logits + Gumbel noise, times their scores without it.

  That draws A experts without replacement, each in proportion to its softmax (Kool et al. 2019,
  arXiv:1903.06059, section 2.3).
  """

  draws: ClassVar[bool] = True

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes each token by itself."""
    if inputs.keys is None:
      return super().select(inputs)
    noise_TE = inputs.draw("noise", jax.random.gumbel, inputs.logits_TE.shape[1])
    expert_TA = inputs.top_k(inputs.logits_TE + noise_TE, inputs.num_active)
    return Selection(expert_TA, self.combine_weights(inputs.scores_TE, expert_TA))
