"""Experts choose tokens: each takes the ones it scores highest, so that loads are even by rule.

A token goes to none of the experts, to some or to all. Its choices are as many as `most` allows,
its best experts first; those that no expert made are not valid and weigh nothing.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.config_io import added
from jaxmoe.core.decimals import decimal, times_nearest, times_up
from jaxmoe.core.errors import InputError
from jaxmoe.moe.routers.router import (
  BatchRouter,
  Buffers,
  Router,
  RouterInputs,
  RouterStatistics,
  Selection,
)
from jaxmoe.moe.routing import RouterSums


@dataclasses.dataclass(frozen=True)
class ByExpert(Router):
  """The base of both rules.

  Attributes:
    factor: How many experts take a token in the mean, as a multiple of `num_active`.
    most: How many experts may have one token, the best by score; 0 for all.
    exact: Whether an expert's places are those of `factor` as it is written; else those of float
      products, which may be one more, as in runs of before.
  """

  normalize: bool = False
  factor: float = 1.0
  most: int = 0
  exact: bool = added(True, before=False)

  varies: ClassVar[bool] = True

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.factor <= 0:
      raise InputError(f"factor must be above 0: factor={self.factor}; 1.0 is usual")

  def check(self, num_experts: int, num_active: int) -> None:
    """Refuses more choices in the mean than there are experts or than a token may have."""
    super().check(num_experts, num_active)
    mean, most = self.mean_active(num_active), self.most or num_experts
    if not mean <= most <= num_experts:
      raise InputError(
        f"a token would have {mean:g} experts in the mean, most={self.most} (0 for all) and "
        f"num_experts={num_experts}; lower factor or num_active, or have most between the two"
      )

  def mean_active(self, num_active: int) -> float:
    """Returns factor * A."""
    return float(decimal(self.factor) * num_active) if self.exact else self.factor * num_active

  def take(self, inputs: RouterInputs, taken_TE: jax.Array) -> Selection:
    """Returns each token's choices of the experts that took it."""
    # No score is negative.
    rank_TE = jnp.where(taken_TE, inputs.scores_TE, -1)
    expert_TA = inputs.top_k(rank_TE, self.most or rank_TE.shape[1])
    valid_TA = jnp.take_along_axis(taken_TE, expert_TA, axis=1)
    return Selection(
      expert_TA, self.combine_weights(inputs.scores_TE, expert_TA, valid_TA), valid_TA
    )


@dataclasses.dataclass(frozen=True)
class ExpertChoice(ByExpert, BatchRouter):
  """Each expert takes its C best of the batch's tokens, C = factor * T * A / E, rounded up.

  Zhou et al. 2022, arXiv:2202.09368, section 3.2: T counts valid tokens, weights are their scores;
  ties go to the earlier token. There experts choose at all times, and generation is left open: no
  causal model can know C later tokens. Here, unless `always`, each token takes its `factor * A`
  best without keys (evaluation), so that a model is scored as it can write. The paper's limit on a
  token's experts is a linear program (section 3.3); `most` is simpler, and leaves places free.

  Attributes:
    always: Whether experts choose in evaluation, too.
  """

  always: bool = False

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes all tokens together; O(T log T * E)."""
    num_experts, mean = inputs.scores_TE.shape[1], self.mean_active(inputs.num_active)
    if inputs.keys is None and not self.always:
      expert_TA = inputs.top_k(inputs.scores_TE, max(1, round(mean)))
      return Selection(expert_TA, self.combine_weights(inputs.scores_TE, expert_TA))
    valid_T1 = inputs.valid_T[:, None]
    rank_TE = jax.lax.stop_gradient(jnp.where(valid_T1, inputs.scores_TE, -1))
    place_TE = jnp.argsort(jnp.argsort(-rank_TE, axis=0), axis=0)
    places = jnp.ceil(mean * jnp.sum(valid_T1) / num_experts)
    if self.exact:
      places = times_up(jnp.sum(valid_T1), decimal(mean) / num_experts, valid_T1.shape[0])
    return self.take(inputs, valid_T1 & (place_TE < places))


@dataclasses.dataclass(frozen=True)
class CausalExpertChoice(ByExpert):
  """Each expert takes the tokens it scores above its threshold, whatever other tokens there are.

  The threshold is the score that C tokens of a step lie above, C as in `ExpertChoice` but rounded,
  as a moving mean over steps: tokens like those gone by fill each expert's share in expectation. It
  is kept in a buffer, so that training, evaluation and generation decide alike. In the first step
  there is none, and each token takes its `factor * A` best. Costs a sort of all scores a step.

  Attributes:
    rate: How much of the way to the last step's threshold the buffer goes; 1 to know no other.
  """

  rate: float = 0.1

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 < self.rate <= 1:
      raise InputError(f"rate must lie in (0, 1]: rate={self.rate}; 0.1 is usual")

  def buffers(self, num_experts: int) -> dict[str, np.ndarray]:
    """Returns a threshold of 0 for every expert, which stands for none."""
    return {"threshold": np.zeros(num_experts, np.float32)}

  def update(
    self, buffers: Buffers, sums: RouterSums, statistics: RouterStatistics | None
  ) -> Buffers:
    """Returns thresholds nearer to those of the step; as they are where it told of no tokens."""
    if statistics is None:
      return buffers
    old_E, tokens = buffers["threshold"], jnp.sum(statistics.valid_T.astype(jnp.int32))
    places = jnp.round(statistics.active * tokens / old_E.shape[0]).astype(jnp.int32)
    if self.exact:
      ratio = decimal(statistics.active) / old_E.shape[0]
      places = times_nearest(tokens, ratio, statistics.valid_T.shape[0])
    score_TE = jnp.where(statistics.valid_T[:, None], statistics.margins_TE, -jnp.inf)
    # The best score that finds no place; 0, below all others, where all find one.
    new_E = jnp.where(places < tokens, jnp.sort(score_TE, axis=0)[-1 - places], 0)
    moved_E = jnp.where(jnp.any(old_E != 0), old_E + self.rate * (new_E - old_E), new_E)
    return {"threshold": jnp.where(tokens > 0, moved_E, old_E)}

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes each token by itself."""
    threshold_E, scores_TE = inputs.buffers["threshold"], jax.lax.stop_gradient(inputs.scores_TE)
    first_TA = inputs.top_k(scores_TE, max(1, round(self.mean_active(inputs.num_active))))
    first_TE = jnp.any(jax.nn.one_hot(first_TA, scores_TE.shape[1], dtype=bool), axis=1)
    above_TE = scores_TE > threshold_E[None]
    taken_TE = jnp.where(jnp.any(threshold_E != 0), above_TE, first_TE)
    return dataclasses.replace(self.take(inputs, taken_TE), margins_TE=scores_TE)
