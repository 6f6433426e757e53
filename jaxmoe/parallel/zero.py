"""ZeRO by hand: weights are gathered for a layer's products, gradients are summed into shards.

Everything here runs inside `shard_map`. A gather's transpose is a reduce-scatter, so the gradient
of a leaf that stage 3 keeps in shards comes in shards. The gradient of any other leaf is what the
device's own copy did to the loss; `ReduceScatter` sums copies, once, over exactly the axes that
hold copies, and scatters what stages 1 and 2 keep in shards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxmoe.core import param_names
from jaxmoe.core.deferred_products import is_format
from jaxmoe.core.layout import LAYER, ONCE, Layout, dims_by_path
from jaxmoe.parallel.degrees import Parallel
from jaxmoe.parallel.layouts import UNEVEN, VOCAB

# What is cheap to make again of a gathered weight: were it kept, so would be the weight.
_VIEWS = frozenset((
  "broadcast_in_dim", "concatenate", "convert_element_type", "dynamic_slice", "pad", "reshape",
  "slice", "squeeze", "transpose",
))  # fmt: skip


def save_all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
  """A remat policy: keeps all results for the backward pass but views, such as of weights."""
  return primitive.name not in _VIEWS


@dataclasses.dataclass(frozen=True)
class LeafGather:
  """How a stored leaf becomes what products use: gathered along a dim, cut along a dim, or as is.

  Attributes:
    gather: The dim that ZeRO spreads over `fsdp`; None where it spreads none.
    cut: The dim and kind of what is stored whole and used in parts by a tensor group.
    once: Whether only the first device of a tensor group has it, and the others zeros.
  """

  gather: int | None = None
  cut: tuple[int, str] | None = None
  once: bool = False


class ParamGatherer:
  """Makes the weights of a layer, or of what surrounds the stack, ready on every device."""

  def __init__(self, parallel: Parallel, layout: Layout, dims: Any, shapes: Any):
    self._parallel, self._axes = parallel, parallel.axes
    bare = dataclasses.replace(layout, sharded={})
    flat_dims = dims_by_path(dims, shapes)
    self._leaves: dict[str, LeafGather] = {}
    for path, leaf in param_names.flatten(shapes).items():
      of = flat_dims[path]
      stored, used = (a.spec("params", of, leaf.shape) for a in (layout, bare))
      first = 1 if of[:1] == (LAYER,) else 0
      moved = [at for at in range(len(of)) if stored[at] != used[at]]
      cut = next(
        ((at - first, dim) for at, dim in enumerate(of)
         if dim in UNEVEN and used[at] is None and self._cut_axes(dim)), None
      )  # fmt: skip
      # Experts that lie over the tensor group, too, have whole products there, and no parts.
      once = ONCE in of and parallel.tensor > 1 and parallel.axes.tensor not in _axes(used)
      self._leaves[path] = LeafGather(moved[0] - first if moved else None, cut, once)

  @property
  def any(self) -> bool:
    """Whether any leaf is gathered, so that the backward pass should gather it again."""
    return any(leaf.gather is not None for leaf in self._leaves.values())

  def gather_outer(self, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters with all leaves ready but those of the stack, which stay as stored."""
    return {
      name: part if name == param_names.STACK else self._ready(part, name)
      for name, part in params.items()
    }

  def gather_layer(self, group: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of one layer of each block of a pattern, ready."""
    return {j: self._ready(part, f"{param_names.STACK}/{group}/{j}") for j, part in params.items()}

  def _ready(self, tree: Any, prefix: str) -> Any:
    flat = param_names.flatten(tree, is_format)

    def gathered(path: str, leaf: Any) -> Any:
      how = self._leaves[f"{prefix}/{path}"]
      if is_format(leaf):
        return dataclasses.replace(leaf, weight=self._gather(leaf.weight, how))
      return self._gather(leaf, how)

    structure = jax.tree.structure(tree, is_leaf=is_format)
    return jax.tree.unflatten(structure, [gathered(path, leaf) for path, leaf in flat.items()])

  def _gather(self, leaf: jax.Array, how: LeafGather) -> jax.Array:
    if how.gather is not None:
      leaf = jax.lax.all_gather(leaf, self._axes.fsdp, axis=how.gather, tiled=True)
    if how.cut is not None:
      leaf = self._cut(leaf, *how.cut)
    if how.once:
      leaf = jnp.where(jax.lax.axis_index(self._axes.tensor) == 0, leaf, jnp.zeros((), leaf.dtype))
    return leaf

  def _cut_axes(self, kind: str) -> tuple[str, ...]:
    """Returns the axes over which parts of a dim that does not divide are used."""
    tensor = (self._axes.tensor,) if self._parallel.tensor > 1 else ()
    return self._parallel.vocab_axes if kind == VOCAB else tensor

  def _cut(self, leaf: jax.Array, dim: int, kind: str) -> jax.Array:
    """Returns a device's part of a leaf that all devices of a group have whole.

    Of fewer key heads than devices each has the one that its query heads read; of a vocabulary
    that does not divide the last device has zeros past the end.
    """
    axes, size = self._cut_axes(kind), leaf.shape[dim]
    degree = math.prod(self._parallel.axis_sizes[axis] for axis in axes)
    rank = jax.lax.axis_index(axes)
    if kind == "kv_heads":
      return jax.lax.dynamic_slice_in_dim(leaf, rank * size // degree, 1, axis=dim)
    part = -(-size // degree)
    padding = [(0, part * degree - size if at == dim else 0) for at in range(leaf.ndim)]
    return jax.lax.dynamic_slice_in_dim(jnp.pad(leaf, padding), rank * part, part, axis=dim)


class ReduceScatter:
  """Sums the gradients of all devices into the layout that the optimizer wants.

  Stage 2 scatters the gradient of each microbatch, so that what is accumulated are shards; stage 1
  accumulates whole gradients and scatters their sum.
  """

  def __init__(self, parallel: Parallel, layout: Layout, dims: Any, shapes: Any):
    self._stage, self._fsdp = parallel.zero, parallel.axes.fsdp
    sizes = parallel.axis_sizes
    flat_dims = dims_by_path(dims, shapes)
    self._scatters: dict[str, int] = {}
    self._sums: dict[str, tuple[str, ...]] = {}
    for path, leaf in param_names.flatten(shapes).items():
      of = flat_dims[path]
      stored, wanted = (layout.spec(role, of, leaf.shape) for role in ("params", "grads"))
      moved = [at for at in range(len(of)) if stored[at] != wanted[at]]
      if moved:
        self._scatters[path] = moved[0]
      holds = set(_axes(wanted))
      self._sums[path] = tuple(
        axis for axis, size in sizes.items() if axis not in holds and size > 1
      )

  def per_microbatch(self, grads: Any) -> Any:
    """Returns a microbatch's gradients as they are accumulated."""
    return self._scattered(grads) if self._stage == 2 else grads

  def finalize(self, grads: Any) -> Any:
    """Returns the accumulated gradients of all devices, whole or in shards as the layout says."""
    grads = grads if self._stage == 2 else self._scattered(grads)
    flat = param_names.flatten(grads)
    summed = {
      path: jax.lax.psum(leaf, self._sums[path]) if self._sums[path] else leaf
      for path, leaf in flat.items()
    }
    return param_names.unflatten(grads, summed)

  def _scattered(self, grads: Any) -> Any:
    flat = param_names.flatten(grads)
    scattered = {
      path: jax.lax.psum_scatter(
        leaf, self._fsdp, scatter_dimension=self._scatters[path], tiled=True
      )
      if path in self._scatters
      else leaf
      for path, leaf in flat.items()
    }
    return param_names.unflatten(grads, scattered)


def _axes(spec: PartitionSpec) -> list[str]:
  """Returns all mesh axes of a spec."""
  parts = [(part,) if isinstance(part, str) else part or () for part in spec]
  return [axis for part in parts for axis in part]
