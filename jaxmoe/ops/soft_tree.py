"""A soft oblique tree: probabilities of its leaves, and what groups of rows see of its decisions.

Node i goes left with the probability sigmoid of its logit; the children of node i are 2 i + 1 and
2 i + 2, and leaves follow the N nodes. What a tree does to a group is told by sums over its rows
alone: of values, and of their slopes by the tree's weights, which are n (1 - n) x in closed form
(Aranyani, Basu Roy Chowdhury et al. 2023, arXiv:2310.11401, section 3.2).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Target = Literal["parity", "load"]
"""What of a tree is compared: decisions of nodes, or probabilities of leaves."""


class TreeSums(NamedTuple):
  """Sums for S groups, float32: of rows, of K values, of their slopes by the nodes of a path.

  They add up over parts of a batch. The last of the D + 1 slopes is that by the bias.
  """

  rows_S: jax.Array
  value_SK: jax.Array
  slope_SKHD: jax.Array


def log_leaves(node_TN: jax.Array) -> jax.Array:
  """Returns (T, N + 1), the log-probability of each leaf, of the N decisions' logits."""
  left_TN, right_TN = jax.nn.log_sigmoid(node_TN), jax.nn.log_sigmoid(-node_TN)
  reach_TM = jnp.zeros_like(node_TN, shape=(node_TN.shape[0], 1))
  while (width := reach_TM.shape[1]) <= node_TN.shape[1]:
    level = slice(width - 1, 2 * width - 1)
    both_TM2 = jnp.stack([left_TN[:, level], right_TN[:, level]], axis=2)
    reach_TM = (reach_TM[:, :, None] + both_TM2).reshape(reach_TM.shape[0], 2 * width)
  return reach_TM


def tree_sums(
  node_TN: jax.Array, x_TD: jax.Array, member_TS: jax.Array, target: Target
) -> TreeSums:
  """Returns what the groups of a batch see of a tree; O(T * S * K * H * D).

  Args:
    node_TN: Logits of the decisions.
    x_TD: What the tree saw.
    member_TS: float32, 1 where a row is of the group; a row of none counts nowhere.
    target: What is compared.
  """
  value_TK, slope_TKH = _values(jax.nn.sigmoid(node_TN), target)
  inputs_TD = jnp.concatenate([x_TD, jnp.ones_like(x_TD[:, :1])], axis=1)
  return TreeSums(
    jnp.sum(member_TS, axis=0),
    member_TS.T @ value_TK,
    jnp.einsum("ts,tkh,td->skhd", member_TS, slope_TKH, inputs_TD),
  )


def no_sums(num_groups: int, nodes: int, dim: int, target: Target) -> TreeSums:
  """Returns the sums of no rows."""
  owner_KH, _ = paths(nodes, target)
  values = (num_groups, len(owner_KH))
  slopes = (*values, owner_KH.shape[1], dim + 1)
  return TreeSums(jnp.zeros(num_groups), jnp.zeros(values), jnp.zeros(slopes))


def paths(nodes: int, target: Target) -> tuple[np.ndarray, np.ndarray]:
  """Returns (K, H) the nodes that each value depends on, and whether they go left to it."""
  if target == "parity":
    return np.arange(nodes)[:, None], np.ones((nodes, 1), bool)
  owner, left = [], []
  at = nodes + np.arange(nodes + 1)
  while at[0] > 0:
    left.append(at % 2 == 1)
    at = (at - 1) // 2
    owner.append(at)
  return np.stack(owner, axis=1), np.stack(left, axis=1)


def _values(node_TN: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
  """Returns (T, K) values and (T, K, H) their derivatives by the logits of the nodes of a path."""
  if target == "parity":
    return node_TN, (node_TN * (1 - node_TN))[:, :, None]
  owner_KH, left_KH = paths(node_TN.shape[1], target)
  node_TKH = node_TN[:, owner_KH]
  value_TK = jnp.prod(jnp.where(left_KH[None], node_TKH, 1 - node_TKH), axis=2)
  return value_TK, value_TK[:, :, None] * jnp.where(left_KH[None], 1 - node_TKH, -node_TKH)
