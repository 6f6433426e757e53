"""Even loads by solving for them: all tokens of a batch share the experts out.

A token's experts depend on later tokens. Without keys (evaluation, generation) each token takes
its best experts for itself, as both are released. Padding takes no part.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.moe.routers.router import BatchRouter, RouterInputs, Selection

State = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Sinkhorn(BatchRouter):
  """The A best of exp(logits) scaled to even rows and columns, times their scores (Megatron-LM).

  Clark et al. 2022, arXiv:2202.01169, section 3.1. As rows do not change who is best, what is left
  of the plan is a bias for every expert; no gradient passes through it.

  Attributes:
    tolerance: Scaling stops where no bias moves further than this.
    iterations: It stops in any case after this many; then loads are less even.
  """

  normalize: bool = False
  tolerance: float = 1e-4
  iterations: int = 100

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.tolerance <= 0 or self.iterations < 1:
      raise InputError(
        "tolerance must be above 0 and iterations at least 1: "
        f"tolerance={self.tolerance}, iterations={self.iterations}"
      )

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes all tokens together."""
    rank_TE = inputs.scores_TE
    if inputs.keys is not None:
      logits_TE = jax.lax.stop_gradient(inputs.logits_TE)
      rank_TE = logits_TE + self._bias(logits_TE, inputs.valid_T)[None]
    expert_TA = inputs.top_k(rank_TE, inputs.num_active)
    return Selection(expert_TA, self.combine_weights(inputs.scores_TE, expert_TA))

  def _bias(self, logits_TE: jax.Array, valid_T: jax.Array) -> jax.Array:
    """Returns (E,), the logarithms of the columns' factors, less their mean."""
    valid_T1 = valid_T[:, None]
    logits_TE = jnp.where(valid_T1, logits_TE, 0)

    def scale(bias_E: jax.Array) -> jax.Array:
      rows_TE = jax.nn.log_softmax(logits_TE + bias_E[None], axis=1)
      # Columns of even sums would all have this logarithm.
      load_E = jax.nn.logsumexp(rows_TE, axis=0, where=valid_T1)
      return bias_E - load_E + jnp.mean(load_E)

    def body(state: State) -> State:
      bias_E, _, number = state
      moved_E = scale(bias_E)
      return moved_E, jnp.max(jnp.abs(moved_E - bias_E)), number + 1

    first = jnp.zeros(logits_TE.shape[1]), jnp.float32(jnp.inf), jnp.int32(0)
    go_on = lambda state: (state[1] > self.tolerance) & (state[2] < self.iterations)  # noqa: E731
    bias_E = jax.lax.while_loop(go_on, body, first)[0]
    return jnp.where(jnp.any(valid_T), bias_E, 0)


@dataclasses.dataclass(frozen=True)
class Auction(BatchRouter):
  """One expert a token, loads even up to rounding, the sum of logits all but the largest.

  BASE layers, Lewis et al. 2021, arXiv:2103.16716; the weight is the sigmoid of the logit. Tokens
  bid for places: what their best expert is worth to them above the second best, and a little more;
  the highest bids stay (Bertsekas and Castanon 1989, for similar objects). Where E does not divide
  T, the experts of the largest summed softmax take one more. A round costs a sort of T bids.

  Attributes:
    slack: How far a token's logit may lie below its part of the optimum, in the mean, as a share
      of the range of a token's logits; the less, the more rounds.
  """

  score: Literal["softmax", "sigmoid", "sqrt_softplus", "relu"] = "sigmoid"
  normalize: bool = False
  slack: float = 0.01

  fixed_active: ClassVar[int | None] = 1

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 1e-4 <= self.slack <= 1:
      raise InputError(f"slack must lie between 1e-4 and 1: slack={self.slack}; 0.01 is usual")

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes all tokens together."""
    expert_TA = inputs.top_k(inputs.logits_TE, 1)
    if inputs.keys is not None:
      logits_TE = jax.lax.stop_gradient(inputs.logits_TE)
      # Finite, and with no level of its own, so that every raise is seen and the auction ends.
      logits_TE = jnp.clip(jnp.nan_to_num(logits_TE), -1e4, 1e4)
      logits_TE -= jnp.max(logits_TE, axis=1, keepdims=True)
      logits_TE = jnp.where(inputs.valid_T[:, None], logits_TE, 0)
      least_raise = jnp.maximum(-self.slack * jnp.min(logits_TE), 1e-6)
      expert_TA = _auction(logits_TE, inputs.valid_T, least_raise)[:, None]
    return Selection(expert_TA, self.combine_weights(inputs.scores_TE, expert_TA))


def _places(logits_TE: jax.Array, valid_T: jax.Array) -> jax.Array:
  """Returns (E,) int32 numbers of places that differ by at most 1 and sum to the valid tokens."""
  num_experts = logits_TE.shape[1]
  demand_E = jnp.sum(jax.nn.softmax(logits_TE, axis=1), axis=0, where=valid_T[:, None])
  rank_E = jnp.argsort(jnp.argsort(-demand_E))
  each, more = jnp.divmod(jnp.sum(valid_T.astype(jnp.int32)), num_experts)
  return each + (rank_E < more).astype(jnp.int32)


def _auction(logits_TE: jax.Array, valid_T: jax.Array, least_raise: jax.Array) -> jax.Array:
  """Returns (T,) int32, the experts of valid tokens, all places taken.

  Ends because each bid lies above the price, so that prices rise until every expert is wanted.
  """
  tokens, num_experts = logits_TE.shape
  places_E = _places(logits_TE, valid_T)
  none_yet_E = jnp.where(places_E > 0, 0.0, 1e9)

  def round_(state: State) -> State:
    expert_T, bid_T, price_E = state
    worth_T2, wanted_T2 = jax.lax.top_k(logits_TE - price_E[None], min(2, num_experts))
    raise_T = worth_T2[:, 0] - worth_T2[:, -1] + least_raise
    looks_T = valid_T & (expert_T == num_experts)
    bid_T = jnp.where(looks_T, price_E[wanted_T2[:, 0]] + raise_T, bid_T)
    expert_T = jnp.where(looks_T, wanted_T2[:, 0], expert_T)
    # Tokens in order of expert, then of bid; who looks for none (padding) stands last.
    order_T = jnp.lexsort((-bid_T, expert_T))
    start_E = jnp.searchsorted(expert_T[order_T], jnp.arange(num_experts))
    place_T = jnp.argsort(order_T) - start_E[jnp.minimum(expert_T, num_experts - 1)]
    stays_T = place_T < places_E.at[expert_T].get(mode="fill", fill_value=0)
    full_E = jnp.bincount(expert_T, length=num_experts) >= jnp.maximum(places_E, 1)
    lowest_E = bid_T[order_T][start_E + places_E - 1]
    return (
      jnp.where(stays_T, expert_T, num_experts),
      bid_T,
      jnp.where(full_E, lowest_E, none_yet_E),
    )

  state = jnp.full(tokens, num_experts), jnp.zeros(tokens), none_yet_E
  looking = lambda state: jnp.any(valid_T & (state[0] == num_experts))  # noqa: E731
  expert_T = jax.lax.while_loop(looking, round_, state)[0]
  return jnp.where(valid_T, expert_T, 0)
