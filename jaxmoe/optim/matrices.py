"""Layers, experts and matrices of a leaf, read from its logical dims.

Layers are stacked for the scan, experts for the grouped product, gate and up for one wide product.
Optimizers that look at a leaf as a whole (its rms, its rows and columns, its singular values) must
look at the parts, or training would depend on how the parts lie in memory.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import EXPERT_DIMS, Dims, is_dims

Axes = tuple[int, ...]


def map_dims(function: Any, dims: Any, *rest: Any) -> Any:
  """Returns the tree of `function(dims of a leaf, *leaves of rest)`."""
  return jax.tree.map(function, dims, *rest, is_leaf=is_dims)


def stack_depth(dims: Dims) -> int:
  """Returns how many leading dims count blocks (layers, then experts), keeping one dim at least."""
  depth = 1 if dims[:1] == ("layer",) else 0
  return depth + 1 if len(dims) > depth + 1 and dims[depth] in EXPERT_DIMS else depth


def matrix_axes(
  name: str, dims: Dims, single_heads: bool = True
) -> tuple[Axes, Axes] | None:
  """Returns where the two sides of a leaf's matrices are, or None if it holds vectors.

  Leading `layer` and `expert`, and `gate` anywhere, only count matrices; `head` belongs to the
  heads before it. So (layer, embed, heads, head) is embed by heads * head in every layer, and
  (layer, expert, embed, gate, mlp) is embed by mlp in every layer, expert and half. The one head
  that has no such dim, as latent attention's rotary key, is a side of its own.

  Args:
    name: Of the leaf.
    dims: Its logical dims.
    single_heads: Whether it is; False takes it for a part of the dim before, and the leaf for
      vectors, as runs of before do.

  Raises:
    InputError: three or more sides are left.
  """
  sides: list[Axes] = []
  for axis in range(stack_depth(dims), len(dims)):
    several = not single_heads or dims[axis - 1] in ("heads", "kv_heads")
    if dims[axis] == "head" and sides and several:
      sides[-1] = (*sides[-1], axis)
    elif dims[axis] != "gate":
      sides.append((axis,))
  if len(sides) > 2:
    raise InputError(
      f"muon needs two sides of a matrix, {name} has {len(sides)}: {dims=}; "
      "add its name to optimizer.adam_names"
    )
  return (sides[0], sides[1]) if len(sides) == 2 else None
