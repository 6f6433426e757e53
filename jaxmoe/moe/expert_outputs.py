"""Outputs of experts under tensor parallelism (TP): partial sums, replicated, or sharded by
token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxmoe.core.parallel_context import ParallelContext


@dataclasses.dataclass(frozen=True)
class ExpertOutputs:
  """Outputs of experts, (B, L, D), by what the devices of a tensor group have of them.

  Attributes:
    partial: Parts of a sum: each device has some of the hidden units.
    replicated: Every device has all.
    sharded: Each device has its share of the tokens.
  """

  partial: jax.Array | None = None
  replicated: jax.Array | None = None
  sharded: jax.Array | None = None

  def add(self, where: str, y_BLD: jax.Array) -> ExpertOutputs:
    """Returns what was found so far and more of one field."""
    had = getattr(self, where)
    return dataclasses.replace(self, **{where: y_BLD if had is None else had + y_BLD})

  def reduce(self, parallel: ParallelContext) -> jax.Array:
    """Returns the sum of all as the stream lies."""
    pairs = (
      (self.partial, parallel.reduce_tensor),
      (self.replicated, parallel.slice_sequence),
      (self.sharded, parallel.all_gather_tokens),
    )
    total, *rest = [arrange(y_BLD) for y_BLD, arrange in pairs if y_BLD is not None]
    return sum(rest, total)


def field_of(module: Any) -> str:
  """Returns whether a tensor group has the hidden units of a module in parts or whole."""
  is_leaf = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
  leaves = jax.tree.leaves(nnx.state(module), is_leaf=is_leaf)
  return "partial" if any("mlp" in leaf.get_metadata()["dims"] for leaf in leaves) else "replicated"
