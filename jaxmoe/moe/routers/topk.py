"""Top-k: a token goes to the A experts with the best scores (Shazeer et al. 2017, section 2.1).

With `normalize` the weights are the scores of the chosen experts over their sum; of a softmax
that equals a softmax over the chosen logits alone (Mixtral, Qwen3). Without it they are the
scores themselves (OLMoE).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.routers.router import Router, RouterInputs, Selection


@dataclasses.dataclass(frozen=True)
class TopK(Router):
  """The A best by score; token-local."""

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes each token by itself; ties go to the lower expert."""
    expert_TA = inputs.top_k(inputs.scores_TE, inputs.num_active)
    return Selection(expert_TA, self.combine_weights(inputs.scores_TE, expert_TA))


@dataclasses.dataclass(frozen=True)
class Switch(TopK):
  """The best expert, times its score as it is (Fedus et al. 2021, arXiv:2101.03961, equation 2).

  Attributes:
    jitter: In training the gate sees every entry of a token times a number drawn uniformly from
      1 - jitter to 1 + jitter (appendix C; the token itself stays as it is).
  """

  normalize: bool = False
  jitter: float = 0.0

  fixed_active: ClassVar[int | None] = 1
  draws: ClassVar[bool] = True

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 <= self.jitter < 1:
      raise InputError(f"jitter must lie between 0 and 1: jitter={self.jitter}; 0.01 is usual")

  def gate_input(self, x_TD: jax.Array, tokens: Tokens, keys: Keys | None) -> jax.Array:
    """Returns float32 tokens with noise, or the tokens where there is none."""
    if keys is None or not self.jitter:
      return x_TD
    low, high = 1 - self.jitter, 1 + self.jitter
    drawn = functools.partial(jax.random.uniform, keys("jitter"), minval=low, maxval=high)
    return x_TD * tokens.draw(drawn, x_TD.shape[1])


@dataclasses.dataclass(frozen=True)
class GShard(TopK):
  """The two best; in training a weak second one only now and then (arXiv:2006.16668, algorithm 1).

  The second expert is kept with probability min(1, 2 g2), of its share g2 in both scores; the
  first one's weight does not change where it is not. Without keys it is always kept.
  """

  fixed_active: ClassVar[int | None] = 2
  varies: ClassVar[bool] = True
  draws: ClassVar[bool] = True

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes each token by itself, by chance in training."""
    chosen = super().select(inputs)
    if inputs.keys is None:
      return chosen
    score_T2 = jnp.take_along_axis(inputs.scores_TE, chosen.expert_TA, axis=1)
    share_T = score_T2[:, 1] / jnp.maximum(jnp.sum(score_T2, axis=1), 1e-20)
    kept_T = 2 * share_T > inputs.draw("second", jax.random.uniform)
    return dataclasses.replace(chosen, valid_TA=jnp.stack([kept_T | True, kept_T], axis=1))
