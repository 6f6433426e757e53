"""Freezing by name: what a glob names does not move, nor decay, nor do its moments.

`layers/*/attention/*` freezes whole leaves, `layers/*/moe/*@0:4` of leaves with experts the first
four and no other leaf, so that experts inserted later learn beside old ones that stay
(ModuleFormer, Shen et al. 2023, section 3.4). A frozen entry's gradient counts for nothing, not
even the norm to clip by; its weight and its moments keep every bit, and go on from there if it is
freed. An average that an optimizer keeps over frozen and free experts moves.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import EXPERT_DIMS, Dims, dims_by_path

Masks = Mapping[str, np.ndarray]
_RANGE = re.compile(r"(.*)@(\d+):(\d+)")


def frozen_masks(
  patterns: Sequence[str], shapes: Any, dims: Any, layer_groups: param_names.LayerGroupSizes | None
) -> Masks:
  """Returns {path: bool}, True where frozen, of 1 in every dim but layers and experts.

  Args:
    patterns: Globs of canonical names, in which `*` also crosses `/`, and after `@` a range of
      experts.
    shapes: The parameters or their shapes.
    dims: A tree like the parameters of tuples of logical dims.
    layer_groups: How layers are grouped in memory; None for a tree that has no stack of layers.

  Raises:
    InputError: a pattern names nothing, a range no leaf with experts or more than a leaf has.
  """
  flat = param_names.flatten(shapes)
  owners = dims_by_path(dims, shapes)
  masks: dict[str, np.ndarray] = {}
  for pattern in patterns:
    ranged = _RANGE.fullmatch(pattern)
    glob = ranged[1] if ranged else pattern
    span = slice(int(ranged[2]), int(ranged[3])) if ranged else None
    named = hit = False
    for path, leaf in flat.items():
      several = None if layer_groups is None else param_names.layer_names(path, layer_groups)
      rows = [fnmatch.fnmatchcase(name, glob) for name in several or [path]]
      if not any(rows):
        continue
      named = True
      if span is None or any(dim in EXPERT_DIMS for dim in owners[path]):
        hit = True
        mask = _mask(pattern, leaf.shape, owners[path], rows if several else None, span)
        masks[path] = masks.get(path, False) | mask
    if named and not hit:
      raise InputError(f"frozen: {pattern!r} names no leaf with experts; leave out the range")
    if not hit:
      raise InputError(
        f"frozen: {pattern!r} names no parameter; one is {_one(flat, layer_groups)!r}"
      )
  return masks


def freeze(inner: optax.GradientTransformation, masks: Masks) -> optax.GradientTransformation:
  """Returns `inner` with the entries of `masks` left alone; its state is that of `inner`."""
  if not masks:
    return inner
  inner = optax.with_extra_args_support(inner)

  def still(tree: Any, old: Any, params: Mapping[str, Any]) -> Any:
    return _still(tree, old, params, masks)

  def update(
    updates: Any, state: optax.OptState, params: Any = None, **extra: Any
  ) -> tuple[Any, Any]:
    flat, zeros = param_names.flatten(updates), jax.tree.map(jnp.zeros_like, updates)
    moves, after = inner.update(still(updates, zeros, flat), state, params, **extra)
    return still(moves, jax.tree.map(jnp.zeros_like, moves), flat), still(after, state, flat)

  return optax.GradientTransformationExtraArgs(inner.init, update)


def hold(masks: Masks, before: Any, after: Any) -> Any:
  """Returns parameters as they are `after`, but the entries of `masks` as they were `before`.

  For what the optimizer does not move, such as the buffers of routers.
  """
  return _still(after, before, param_names.flatten(after), masks) if masks else after


def _still(tree: Any, old: Any, params: Mapping[str, Any], masks: Masks) -> Any:
  """Returns a tree of parameters or of state with the old values where it is frozen."""
  flat, before = param_names.flatten(tree), param_names.flatten(old)
  kept = {path: _keep(path, leaf, before[path], masks, params) for path, leaf in flat.items()}
  return param_names.unflatten(tree, kept)


def _mask(
  pattern: str, shape: tuple[int, ...], dims: Dims, rows: list[bool] | None, span: slice | None
) -> np.ndarray:
  """Returns the mask of one leaf; `rows` are the layers hit, None if it is not stacked."""
  mask = np.ones([1] * len(shape), bool)
  if rows is not None:
    mask = mask & np.array(rows).reshape(-1, *[1] * (len(shape) - 1))
  if span is None:
    return mask
  axis = next(at for at, dim in enumerate(dims) if dim in EXPERT_DIMS)
  if not 0 <= span.start < span.stop <= shape[axis]:
    raise InputError(f"frozen: {pattern!r} names experts that a leaf of shape {shape} has not")
  experts = np.zeros(shape[axis], bool)
  experts[span] = True
  return mask & experts.reshape(-1, *[1] * (len(shape) - axis - 1))


def _keep(
  path: str, new: jax.Array, old: jax.Array, masks: Masks, params: Mapping[str, Any]
) -> jax.Array:
  """Returns a leaf of parameters or of state with the old values where it is frozen."""
  pieces = path.split("/")
  tails = ("/".join(pieces[start:]) for start in range(len(pieces)))
  owner = next((tail for tail in tails if tail in masks), None)
  if owner is None:
    return new
  mask = _of_state(masks[owner], params[owner].shape, new.shape)
  return jnp.where(jnp.broadcast_to(mask, new.shape), old, new)


def _of_state(mask: np.ndarray, shape: tuple[int, ...], like: tuple[int, ...]) -> np.ndarray:
  """Returns the mask of state of shape `like`: the parameter's own, or less the dims it lacks."""
  if shape == like:
    return mask
  lacking = [axis for axis in range(len(shape)) if shape[:axis] + shape[axis + 1 :] == like]
  if lacking:  # of two dims of one size either may be the missing one
    return np.logical_and.reduce([np.broadcast_to(mask.all(axis), like) for axis in lacking])
  return np.zeros([1] * len(like), bool)  # a placeholder, which never changes


def _one(flat: Mapping[str, Any], layer_groups: param_names.LayerGroupSizes | None) -> str:
  path = next(iter(flat))
  return path if layer_groups is None else param_names.canonical_name(path, layer_groups)
