"""Balance without an auxiliary loss: a bias moves what experts are chosen by, never weights.

The buffer changes once a step, from all of its tokens, whatever the optimizer does.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.moe.routers.router import (
  Buffers,
  Router,
  RouterInputs,
  RouterStatistics,
  Selection,
)
from jaxmoe.moe.routing import RouterSums


@dataclasses.dataclass(frozen=True)
class AuxFree(Router):
  """The A best by score + bias, out of the best groups; weights know no bias.

  DeepSeek-V3, arXiv:2412.19437, equations 15 and 16 and section 2.1.2; arXiv:2408.15664.

  Attributes:
    bias_rate: How far a step lowers the bias of experts with more than the mean load, before
      drops, and raises that of those with less; 0 holds it still.
    num_groups: Groups (nodes) of equally many experts, which stand together; 1 for no limit.
    groups_active: In how many of them a token's experts may lie.
    group_best: How many experts of a group are added up to rank it (V3: 2, V2: 1).
  """

  score: Literal["softmax", "sigmoid", "sqrt_softplus", "relu"] = "sigmoid"
  bias_rate: float = 1e-3
  num_groups: int = 1
  groups_active: int = 1
  group_best: int = 2

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.bias_rate < 0:
      raise InputError(f"bias_rate must not be negative: bias_rate={self.bias_rate}")
    if not 1 <= self.groups_active <= self.num_groups or self.group_best < 1:
      raise InputError(
        "groups_active must lie between 1 and num_groups, and group_best be at least 1: "
        f"groups_active={self.groups_active}, num_groups={self.num_groups}, "
        f"group_best={self.group_best}"
      )

  def check(self, num_experts: int, num_active: int) -> None:
    """Refuses experts that fall into no equal groups, or groups too small."""
    super().check(num_experts, num_active)
    size, rest = divmod(num_experts, self.num_groups)
    least = max(-(-num_active // self.groups_active), self.group_best)
    if self.num_groups > 1 and (rest or size < least):
      raise InputError(
        f"num_groups must divide num_experts into groups of {least} or more: num_experts="
        f"{num_experts}, num_groups={self.num_groups}; have fewer groups or more groups_active"
      )

  def buffers(self, num_experts: int) -> dict[str, np.ndarray]:
    """Returns a bias of zero for every expert."""
    return {"bias": np.zeros(num_experts, np.float32)}

  def update(
    self, buffers: Buffers, sums: RouterSums, statistics: RouterStatistics | None
  ) -> Buffers:
    """Returns the bias moved by `bias_rate` towards even counts."""
    del statistics
    sign_E = jnp.sign(jnp.mean(sums.counts_E) - sums.counts_E)
    return {"bias": buffers["bias"] + self.bias_rate * sign_E}

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes each token by itself."""
    rank_TE = jax.lax.stop_gradient(inputs.scores_TE + inputs.buffers["bias"][None])
    if self.num_groups > 1:
      rank_TE = self._in_groups(inputs, rank_TE)
    expert_TA = inputs.top_k(rank_TE, inputs.num_active)
    return Selection(expert_TA, self.combine_weights(inputs.scores_TE, expert_TA))

  def _in_groups(self, inputs: RouterInputs, rank_TE: jax.Array) -> jax.Array:
    """Returns the ranks, below all others outside of a token's best groups."""
    rank_TGM = rank_TE.reshape(rank_TE.shape[0], self.num_groups, -1)
    merit_TG = jnp.sum(jax.lax.top_k(rank_TGM, self.group_best)[0], axis=-1)
    group_TN = inputs.top_k(merit_TG, self.groups_active)
    active_TG = jnp.any(jax.nn.one_hot(group_TN, self.num_groups, dtype=bool), axis=1)
    return jnp.where(active_TG[:, :, None], rank_TGM, -jnp.inf).reshape(rank_TE.shape)


@dataclasses.dataclass(frozen=True)
class Quantile(Router):
  """The A best by logit - beta, where beta made the load even in the step before.

  Quantile balancing, as Marin's Grug and Megatron-LM (`quantile_balancing`) have it. A token's
  threshold is its (A + 1)-th best biased logit, an expert's margins the logits over thresholds.
  The new beta is the quantile 1 - A/E of its margins over all valid tokens of the step, exactly:
  neither the order of tokens nor how they lie in microbatches and on devices matters (Grug's mean
  of the quantiles of devices depends on their number). Costs a sort of all margins a step, which
  are kept until then.
  """

  score: Literal["softmax", "sigmoid", "sqrt_softplus", "relu"] = "sigmoid"

  def buffers(self, num_experts: int) -> dict[str, np.ndarray]:
    """Returns a beta of zero for every expert."""
    return {"beta": np.zeros(num_experts, np.float32)}

  def update(
    self, buffers: Buffers, sums: RouterSums, statistics: RouterStatistics | None
  ) -> Buffers:
    """Returns the n-th largest margins, n = T A // E but at least 1, less their mean.

    Only differences matter. Without tokens, or where choices were given, beta stays as it is.
    """
    if statistics is None:
      return buffers
    del sums
    num_experts = buffers["beta"].shape[0]
    tokens = jnp.sum(statistics.valid_T.astype(jnp.int32))
    margins_TE = jnp.where(statistics.valid_T[:, None], statistics.margins_TE, -jnp.inf)
    nth = jnp.maximum(tokens * int(statistics.active) // num_experts, 1)
    beta_E = jnp.sort(margins_TE, axis=0)[-nth]
    return {"beta": jnp.where(tokens > 0, beta_E - jnp.mean(beta_E), buffers["beta"])}

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes each token by itself; where A = E the threshold is the last logit."""
    biased_TE = jax.lax.stop_gradient(inputs.logits_TE - inputs.buffers["beta"][None])
    ranked_TA = inputs.top_k(biased_TE, min(inputs.num_active + 1, biased_TE.shape[1]))
    threshold_T1 = jnp.take_along_axis(biased_TE, ranked_TA[:, -1:], axis=1)
    expert_TA = ranked_TA[:, : inputs.num_active]
    return Selection(
      expert_TA,
      self.combine_weights(inputs.scores_TE, expert_TA),
      margins_TE=jax.lax.stop_gradient(inputs.logits_TE) - threshold_T1,
    )
