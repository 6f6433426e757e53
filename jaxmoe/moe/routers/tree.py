"""A gate that is an oblique soft tree: log2 E decisions lead to an expert (Aranyani).

Basu Roy Chowdhury et al. 2023, arXiv:2310.11401, section 3.1: node i goes left with probability
sigmoid(x w_i + b_i), and a leaf's probability is the product along its path. All in logarithms.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weight_formats import dot
from jaxmoe.moe.routers.gate_base import GateConfig
from jaxmoe.ops.soft_tree import TreeSums, log_leaves, tree_sums


@dataclasses.dataclass(frozen=True)
class TreeGateConfig(GateConfig):
  """Logits that are log-probabilities of leaves: their softmax is these, their z-loss is 0."""

  separable: ClassVar[bool] = False
  decides: ClassVar[bool] = True

  def check(self, num_experts: int) -> None:
    """Refuses numbers of leaves that no full tree has."""
    if num_experts & (num_experts - 1):
      raise InputError(
        f"a tree's leaves are its experts, a power of two: {num_experts} open ones; use "
        f"{1 << num_experts.bit_length() - 1} or {1 << num_experts.bit_length()}"
      )

  def build(self, init: Init, dim: int, num_experts: int) -> TreeGate:
    """Returns the module with the weights of its E - 1 nodes."""
    return TreeGate(init, dim, num_experts)

  def num_params(self, dim: int, num_experts: int) -> int:
    """Returns the number of parameters."""
    return (dim + 1) * (num_experts - 1)


class TreeGate(nnx.Module):
  """The weights of a `TreeGateConfig`, level by level: the children of node i are 2 i + 1 and 2 i +
  2."""

  def __init__(self, init: Init, dim: int, num_experts: int):
    nodes = num_experts - 1
    self.weight = init.weight("weight", (dim, nodes), ("embed", None), fan_in=dim)
    self.bias = init.zeros((nodes,), (None,))

  def __call__(self, x_TD: jax.Array, previous_logits: Any) -> tuple[jax.Array, Any]:
    """Returns float32 logits (T, E) and `previous_logits` as they came."""
    return log_leaves(self._decisions(x_TD)), previous_logits

  def domain_sums(self, x_TD: jax.Array, tokens: Tokens) -> TreeSums:
    """Returns what each domain of the valid tokens sees of the tree; no gradient."""
    assert tokens.compare is not None and tokens.domain is not None
    domain_T = jnp.where(tokens.valid, tokens.domain, -1).reshape(-1)
    member_TS = jax.nn.one_hot(domain_T, tokens.compare.num_domains)
    node_TN, x_TD = self._decisions(x_TD), x_TD.astype(jnp.float32)
    return jax.lax.stop_gradient(tree_sums(node_TN, x_TD, member_TS, tokens.compare.target))

  def _decisions(self, x_TD: jax.Array) -> jax.Array:
    """Returns (T, N) float32, the logits of going left."""
    bias_N = self.bias.get_value().astype(jnp.float32)
    return dot(self.weight.get_value(), x_TD.astype(jnp.float32), "td,dn->tn") + bias_N[None]
