"""A gradient that makes a soft tree treat groups alike, from a stream and in constant memory.

Aranyani (Basu Roy Chowdhury et al. 2023, arXiv:2310.11401, section 3.2): for each group of tokens
(a language, a tenant) keep means of the tree's decisions and of their gradients, which are
n (1 - n) x in closed form; no token is kept. The gradient of sum_i H(F_i), F_i the difference of
the means of two groups, needs no more. Added to that of a loss it pulls the groups together.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmoe.core import names
from jaxmoe.core.errors import InputError


class ParityState(NamedTuple):
  """Decayed sums for S groups: of tokens, of K values, of their slopes by h nodes of a path."""

  tokens_S: jax.Array
  value_SK: jax.Array
  slope_SKHD: jax.Array


@dataclasses.dataclass(frozen=True)
class OnlineParity:
  """What of a tree is to be alike in all groups, and how hard it is pulled.

  The penalty is the Huber function of every difference over `delta`, summed over values and pairs
  of groups: its slope grows to 1 at `delta` and stays there (released code jumps there from delta).

  Attributes:
    num_groups: S, how many groups there are; tokens of other numbers count in none.
    target: `parity` for decisions of nodes, which bounds what follows from them; `load` for
      probabilities of leaves, the share of each expert.
    weight: Of the penalty.
    decay: Of the sums, for each batch in which a group occurs: sums made with older parameters
      fade. Sums are divided by equally decayed numbers of tokens, which corrects the start; 1 keeps
      exact means.
    delta: Where the penalty turns from a square to a line.
  """

  num_groups: int = 2
  target: Literal["parity", "load"] = "parity"
  weight: float = 1.0
  decay: float = 0.99
  delta: float = 0.01

  def __post_init__(self) -> None:
    if self.num_groups < 2 or self.target not in ("parity", "load"):
      raise InputError(
        "num_groups must be at least 2 and target be parity or load: "
        f"num_groups={self.num_groups}, target={self.target!r}"
      )
    if self.weight < 0 or not 0 < self.decay <= 1 or self.delta <= 0:
      raise InputError(
        "weight must not be negative, decay lie in (0, 1] and delta above 0: "
        f"weight={self.weight}, decay={self.decay}, delta={self.delta}"
      )

  def transform(self, prefix: str = "") -> optax.GradientTransformationExtraArgs:
    """Returns the transform, to stand before an optimizer in a chain.

    Its update also takes `rows` (T, D), what the tree saw, and `groups` (T,) int. It adds to the
    gradients of `weight` (D, N) and `bias` (N,), paths that start with `prefix`, and to no other.
    """

    def init(params: Any) -> ParityState:
      dim, nodes = names.flatten(params)[f"{prefix}weight"].shape
      owner_KH, _ = _paths(nodes, self.target)
      sums = (self.num_groups, len(owner_KH))
      slopes = (*sums, owner_KH.shape[1], dim + 1)
      return ParityState(jnp.zeros(sums[:1]), jnp.zeros(sums), jnp.zeros(slopes))

    def update(
      updates: Any, state: ParityState, params: Any = None, *,
      rows: jax.Array, groups: jax.Array, **others: Any,
    ) -> tuple[Any, ParityState]:  # fmt: skip
      del others
      tree, flat = names.flatten(params), names.flatten(updates)
      weight, bias = f"{prefix}weight", f"{prefix}bias"
      state = self._absorb(state, tree[weight], tree[bias], rows, groups)
      pull_ND = self.weight * self._pull(state, tree[bias].shape[0])
      flat[weight] = flat[weight] + pull_ND[:, :-1].T.astype(flat[weight].dtype)
      flat[bias] = flat[bias] + pull_ND[:, -1].astype(flat[bias].dtype)
      return names.unflatten(updates, flat), state

    return optax.GradientTransformationExtraArgs(init, update)

  def _absorb(
    self, state: ParityState, weight_DN: jax.Array, bias_N: jax.Array, rows_TD: jax.Array,
    group_T: jax.Array,
  ) -> ParityState:  # fmt: skip
    """Returns the sums with those of a batch."""
    node_TN = jax.nn.sigmoid(rows_TD @ weight_DN + bias_N[None])
    value_TK, slope_TKH = _values(node_TN, self.target)
    ones_T1 = jnp.ones((rows_TD.shape[0], 1))
    member_TS = jax.nn.one_hot(group_T, self.num_groups)
    here_S = jnp.sum(member_TS, axis=0)
    fade_S = jnp.where(here_S > 0, self.decay, 1.0)
    inputs_TD = jnp.concatenate([rows_TD, ones_T1], axis=1)
    slope_SKHD = jnp.einsum("ts,tkh,td->skhd", member_TS, slope_TKH, inputs_TD)
    return ParityState(
      fade_S * state.tokens_S + here_S,
      fade_S[:, None] * state.value_SK + member_TS.T @ value_TK,
      fade_S[:, None, None, None] * state.slope_SKHD + slope_SKHD,
    )

  def _pull(self, state: ParityState, nodes: int) -> jax.Array:
    """Returns (N, D + 1), the gradient of the penalty by the weights of each node and its bias."""
    known_S, count_S = state.tokens_S > 0, jnp.maximum(state.tokens_S, 1e-20)
    mean_SK = state.value_SK / count_S[:, None]
    slope_SKHD = state.slope_SKHD / count_S[:, None, None, None]
    gap_SSK = (mean_SK[:, None] - mean_SK[None]) / self.delta
    both_SS1 = (known_S[:, None] & known_S[None])[:, :, None]
    force_SK = jnp.sum(jnp.where(both_SS1, jnp.clip(gap_SSK, -1, 1), 0), axis=1)
    owner_KH, _ = _paths(nodes, self.target)
    pull_KHD = jnp.einsum("sk,skhd->khd", force_SK, slope_SKHD)
    return jnp.zeros((nodes, pull_KHD.shape[2])).at[owner_KH].add(pull_KHD)


def _values(node_TN: jax.Array, target: str) -> tuple[jax.Array, jax.Array]:
  """Returns (T, K) values and (T, K, H) their derivatives by the logits of the nodes of a path."""
  if target == "parity":
    return node_TN, (node_TN * (1 - node_TN))[:, :, None]
  owner_KH, left_KH = _paths(node_TN.shape[1], target)
  node_TKH = node_TN[:, owner_KH]
  value_TK = jnp.prod(jnp.where(left_KH[None], node_TKH, 1 - node_TKH), axis=2)
  return value_TK, value_TK[:, :, None] * jnp.where(left_KH[None], 1 - node_TKH, -node_TKH)


def _paths(nodes: int, target: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns (K, H) the nodes that each value depends on, and whether they go left to it."""
  if target == "parity":
    return np.arange(nodes)[:, None], np.ones((nodes, 1), bool)
  owner, left = [], []
  at = nodes + np.arange(nodes + 1)  # leaves follow the nodes; the children of i are 2 i + 1, + 2
  while at[0] > 0:
    left.append(at % 2 == 1)
    at = (at - 1) // 2
    owner.append(at)
  return np.stack(owner, axis=1), np.stack(left, axis=1)
