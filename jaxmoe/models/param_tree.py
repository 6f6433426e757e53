"""Parameters as nested dicts of arrays, and their logical dims, of modules of flax.nnx."""

from __future__ import annotations

from typing import Any

from flax import nnx

from jaxmoe.core import param_names

Params = dict[str, Any]


def values_of(state: Any) -> Params:
  """Returns nested dicts of arrays for nested dicts of `nnx.State`."""
  if isinstance(state, nnx.State):
    return nnx.to_pure_dict(state)
  return {name: values_of(child) for name, child in state.items()}


def dims_of(state: Any, stacked: bool = False) -> Params:
  """Returns nested dicts of logical dims; a leaf of a stack starts with 'layer'."""
  if isinstance(state, nnx.Variable):
    dims = tuple(state.get_metadata()["dims"])
    return ("layer", *dims) if stacked else dims  # type: ignore[return-value]
  return {
    name: dims_of(child, stacked or name == param_names.STACK) for name, child in state.items()
  }
