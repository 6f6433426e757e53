"""A gradient that makes soft trees treat groups alike, from a stream and in constant memory.

Aranyani (Basu Roy Chowdhury et al. 2023, arXiv:2310.11401, section 3.2): for each group of rows
(a language, a tenant, a domain of the data) keep means of a tree's decisions and of their
gradients; no row is kept. The gradient of sum_i H(F_i), F_i the difference of the means of two
groups, needs no more. Added to that of a loss it pulls the groups together; only the tree's own
weights get it, neither what it leads to nor what it sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.ops.guard import keep_unless
from jaxmoe.ops.soft_tree import TreeSums, no_sums, paths

FairnessState = dict[str, TreeSums]
"""Decayed sums by the path of the tree."""


@dataclasses.dataclass(frozen=True)
class OnlineFairness:
  """What of a tree is to be alike in all groups, and how hard it is pulled.

  The penalty is the Huber function of every difference over `delta`, summed over values and pairs
  of groups: its slope grows to 1 at `delta` and stays there (released code jumps there from delta).

  Attributes:
    weight: Of the penalty; 0 for none, and nothing is kept.
    target: `parity` for decisions of nodes, which bounds what follows from them; `load` for
      probabilities of leaves, the share of each expert.
    decay: Of the sums, for each step in which a group occurs: sums made with older parameters
      fade. Sums are divided by equally decayed numbers of rows, which corrects the start; 1 keeps
      exact means.
    delta: Where the penalty turns from a square to a line.
  """

  weight: float = 0.0
  target: Literal["parity", "load"] = "parity"
  decay: float = 0.99
  delta: float = 0.01

  def __post_init__(self) -> None:
    if self.target not in ("parity", "load"):
      raise InputError(f"target must be parity or load: target={self.target!r}")
    if self.weight < 0 or not 0 < self.decay <= 1 or self.delta <= 0:
      raise InputError(
        "weight must not be negative, decay lie in (0, 1] and delta above 0: "
        f"weight={self.weight}, decay={self.decay}, delta={self.delta}"
      )

  def transform(
    self, trees: Sequence[str], num_groups: int
  ) -> optax.GradientTransformationExtraArgs:
    """Returns the transform, to stand before an optimizer in a chain.

    Its update also takes `ok` (`ops/guard.py`) and `trees`, {path: the `TreeSums` of the step}.
    It adds to the gradients of `weight` (D, N) and `bias` (N,) of each tree and to no other; those
    of trees that are stacked over layers have these in dim 0, like their sums, and each layer has
    means of its own.

    Args:
      trees: Paths of the trees.
      num_groups: S, how many groups there are.

    Raises:
      InputError: there is nothing to compare.
    """
    if num_groups < 2:
      raise InputError(f"fairness compares groups, at least 2 of them: {num_groups} given")

    def init(params: Any) -> FairnessState:
      flat, state = param_names.flatten(params), {}
      for tree in trees:
        *layers, dim, nodes = flat[f"{tree}/weight"].shape
        empty = no_sums(num_groups, nodes, dim, self.target)
        state[tree] = jax.tree.map(lambda leaf, at=layers: jnp.zeros((*at, *leaf.shape)), empty)
      return state

    def update(
      updates: Any, state: FairnessState, params: Any = None, *, trees: Mapping[str, TreeSums],
      ok: jax.Array | None = None, **others: Any,
    ) -> tuple[Any, FairnessState]:  # fmt: skip
      del params, others
      flat = param_names.flatten(updates)
      new = {tree: self.absorb(sums, trees[tree]) for tree, sums in state.items()}
      for tree, sums in new.items():
        weight, bias = flat[f"{tree}/weight"], flat[f"{tree}/bias"]
        pull = self.pull if weight.ndim == 2 else jax.vmap(self.pull)
        weight_pull, bias_pull = pull(sums)
        flat[f"{tree}/weight"] = weight + weight_pull.astype(weight.dtype)
        flat[f"{tree}/bias"] = bias + bias_pull.astype(bias.dtype)
      return param_names.unflatten(updates, flat), keep_unless(ok, new, state)

    return optax.GradientTransformationExtraArgs(init, update)

  def absorb(self, old: TreeSums, new: TreeSums) -> TreeSums:
    """Returns the sums with those of a step; groups that do not occur in it do not fade."""
    fade_S = jnp.where(new.rows_S > 0, self.decay, 1.0)

    def faded(old: jax.Array, new: jax.Array) -> jax.Array:
      return fade_S.reshape(*fade_S.shape, *[1] * (old.ndim - fade_S.ndim)) * old + new

    return jax.tree.map(faded, old, new)

  def pull(self, sums: TreeSums) -> tuple[jax.Array, jax.Array]:
    """Returns (D, N) and (N,), the gradient of the weighted penalty by weights and biases."""
    known_S, count_S = sums.rows_S > 0, jnp.maximum(sums.rows_S, 1e-20)
    mean_SK = sums.value_SK / count_S[:, None]
    slope_SKHD = sums.slope_SKHD / count_S[:, None, None, None]
    gap_SSK = (mean_SK[:, None] - mean_SK[None]) / self.delta
    both_SS1 = (known_S[:, None] & known_S[None])[:, :, None]
    force_SK = jnp.sum(jnp.where(both_SS1, jnp.clip(gap_SSK, -1, 1), 0), axis=1)
    pull_KHD = self.weight * jnp.einsum("sk,skhd->khd", force_SK, slope_SKHD)
    num_values = mean_SK.shape[1]
    nodes = num_values if self.target == "parity" else num_values - 1
    owner_KH, _ = paths(nodes, self.target)
    pull_ND = jnp.zeros((nodes, pull_KHD.shape[2])).at[owner_KH].add(pull_KHD)
    return pull_ND[:, :-1].T, pull_ND[:, -1]
