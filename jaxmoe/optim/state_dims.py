"""The logical dims of an optimizer's state, so that a Layout can shard it like the parameters.

`jax.jit(transform.init)` alone puts the zeros on one device, since they do not depend on the
parameters' values. So: `dims = state_dims(jax.eval_shape(transform.init, params), params, dims)`,
and `jax.jit(transform.init, out_shardings=layout.shardings('optimizer', dims, shapes))`.
"""

from __future__ import annotations

from typing import Any

from jaxmoe.core.layout import Dims, dims_by_path
from jaxmoe.core.param_names import flatten, unflatten
from jaxmoe.optim.matrices import stack_depth


def state_dims(state: Any, params: Any, dims: Any) -> Any:
  """Returns a tree like `state` of dims; both trees may be abstract.

  A moment has its parameter's dims, a row or column of one those that are left, and a placeholder
  the leading layers and experts. What belongs to no parameter has no names.
  """
  leaves = flatten(params)
  owners = dims_by_path(dims, params)
  found: dict[str, Dims] = {}
  for path, leaf in flatten(state).items():
    pieces = path.split("/")
    tails = ("/".join(pieces[start:]) for start in range(len(pieces)))
    owner = next((tail for tail in tails if tail in owners), None)
    if owner is None:
      found[path] = (None,) * leaf.ndim
    else:
      found[path] = _leaf_dims(leaf.shape, leaves[owner].shape, owners[owner])
  return unflatten(state, found)


def _leaf_dims(shape: tuple[int, ...], param_shape: tuple[int, ...], dims: Dims) -> Dims:
  """Returns the dims of a state leaf of this shape that belongs to such a parameter."""
  if shape == param_shape:
    return dims
  # Of two dims of one size either may be the missing one: the sharding is valid both ways.
  for axis in range(len(dims)):
    if shape == param_shape[:axis] + param_shape[axis + 1 :]:
      return dims[:axis] + dims[axis + 1 :]
  depth = stack_depth(dims)
  assert shape[:depth] == param_shape[:depth], f"no view of a parameter: {shape=}, {param_shape=}"
  return dims[:depth] + (None,) * (len(shape) - depth)
