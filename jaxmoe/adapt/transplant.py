"""Carries parameters and optimizer state from a model to what a surgery makes of it.

Everything goes by canonical names, a layer at a time, so it does not matter how either stack is
split, and each layer has origins of its own. Which dim of a leaf counts experts is told by where
its shape differs in the two models. Moments follow: copied with the weights they belong to, dropped
with them, zero for what is new. Works on the host, which holds both models whole meanwhile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmoe.adapt.surgery import NEW, Origins, Surgery
from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys
from jaxmoe.models.transformer import Decoder, Params

Shape = tuple[int, ...]
Named = Mapping[str, np.ndarray]
Likes = dict[str, jax.ShapeDtypeStruct]
ROUTER_SCALE = 0.1
"""What the fresh router of an upcycled layer is multiplied by: nearly even, and no two alike."""


def transplant_params(
  surgery: Surgery, old: Decoder, new: Decoder, params: Params, keys: Keys
) -> Params:
  """Returns the parameters of `new`, which is `Decoder(surgery.model, ...)`.

  Args:
    surgery: What was done.
    old: Whose parameters `params` are.
    new: Whose are returned.
    params: Plain arrays.
    keys: Where fresh weights are drawn from, as the model draws its own.

  Raises:
    InputError: a family of several kinds of experts, a gate that cannot follow them, or
      parameters that are no plain arrays.
  """
  if not surgery.from_dense:
    _check_family(old)
    _check_gates(old, new)
  if param_names.flatten(params).keys() != param_names.flatten(old.shapes).keys():
    raise InputError("surgery needs plain parameters; merge low-rank updates first")
  fresh = _fresh(surgery, new, keys)
  before = _by_name(params, old.layer_groups)
  likes = _likes(new.shapes, new.layer_groups)
  moved = {name: _follow(surgery, name, before, like, fresh) for name, like in likes.items()}
  if surgery.from_dense:
    for depth in surgery.experts:
      gate_up, down = (
        f"{param_names.LAYERS}/{depth}/moe/experts/{of}" for of in ("gate_up", "down")
      )
      draw = keys / "variety" / str(depth)
      moved[gate_up], moved[down] = surgery.variety.apply(moved[gate_up], moved[down], draw)
  return _rebuilt(new.shapes, moved, new.layer_groups)


def _fresh(surgery: Surgery, new: Decoder, keys: Keys) -> Named:
  """Returns fresh parameters of `new`, none where everything has an origin."""
  if all(NEW not in ids for of in (surgery.experts, surgery.routed) for ids in of.values()):
    return {}
  if new.config.param_dtype != "float32":  # which is for files, and not for what is drawn
    new = Decoder(dataclasses.replace(new.config, param_dtype="float32"), new.vocab_size)
  fresh = _by_name(new.init(Keys(keys("surgery"))), new.layer_groups)
  if not surgery.from_dense:
    return fresh
  return {name: x * ROUTER_SCALE if "/router/gate/" in name else x for name, x in fresh.items()}


def transplant_moments(surgery: Surgery, old: Decoder, new: Decoder, state: Any, like: Any) -> Any:
  """Returns the optimizer state of `new`.

  Args:
    surgery: What was done.
    old: The model of `state`.
    new: The other.
    state: An optimizer's state; what belongs to a parameter stands under the parameter's path.
    like: Its shapes for `new`, `jax.eval_shape(transform.init, new.shapes)`.

  Raises:
    InputError: a moment that averages over experts, as a factored one of a router column does.
  """
  before = _by_name(state, old.layer_groups)
  owners = _likes(old.shapes, old.layer_groups), _likes(new.shapes, new.layer_groups)
  moved = {}
  for name, leaf in _likes(like, new.layer_groups).items():
    source = source_name(surgery, name)
    if _mixes_experts(name, before.get(source), leaf.shape, owners):
      raise InputError(
        f"the optimizer's {name} is an average over experts and cannot follow them; "
        "start the optimizer anew (--reset_moments)"
      )
    moved[name] = _follow(surgery, name, before, leaf, {})
  return _rebuilt(like, moved, new.layer_groups)


def _follow(
  surgery: Surgery, name: str, before: Named, like: jax.ShapeDtypeStruct, fresh: Named
) -> np.ndarray:
  """Returns one leaf of one layer; what has no origin is of `fresh`, or zero."""
  source, origins = source_name(surgery, name), _origins(surgery, name)
  new = fresh[name] if name in fresh else np.zeros(like.shape, like.dtype)
  if source not in before:
    return new
  x = before[source]
  if x.shape == like.shape:
    return x
  assert origins is not None, f"{name}: {x.shape} -> {like.shape}"
  if source != name:  # a dense weight has no dim of experts yet
    return np.broadcast_to(x[None], like.shape)
  axis = next(axis for axis, size in enumerate(x.shape) if size != like.shape[axis])
  index = np.array(origins)
  is_new = (index == NEW).reshape(-1, *[1] * (x.ndim - axis - 1))
  is_new = np.broadcast_to(is_new, like.shape)
  return np.where(is_new, new, np.take(x, np.maximum(index, 0), axis=axis))


def source_name(surgery: Surgery, name: str) -> str:
  """Returns the name of the leaf that a leaf's values come from."""
  depth = _depth(name)
  if surgery.from_dense and depth in surgery.experts:
    return name.replace("/moe/experts/", "/mlp/")
  return name


def _origins(surgery: Surgery, name: str) -> Origins | None:
  """Returns the origins of the experts in a leaf, None if it has nothing to do with any."""
  depth = _depth(name)
  if depth is None or depth not in surgery.experts:
    return None
  if "/moe/experts/" in name:
    return surgery.experts[depth]
  return surgery.routed[depth] if "/moe/router/" in name else None


def _depth(name: str) -> int | None:
  pieces = name.split("/")
  return int(pieces[pieces.index(param_names.LAYERS) + 1]) if param_names.LAYERS in pieces else None


def _mixes_experts(
  name: str, x: np.ndarray | None, shape: Shape, owners: tuple[Likes, Likes]
) -> bool:
  """Whether a leaf of state belongs to a parameter with experts and has no dim for them."""
  pieces = name.split("/")
  tails = ("/".join(pieces[start:]) for start in range(len(pieces)))
  owner = next((tail for tail in tails if tail in owners[1]), None)
  if x is None or owner not in owners[0]:
    return False
  changed = _changes(owners[0][owner].shape, owners[1][owner].shape)
  if changed and x.shape == shape:
    return math.prod(shape) > 1  # else a placeholder
  return _changes(x.shape, shape) != changed


def _changes(old: Shape, new: Shape) -> list[tuple[int, int]]:
  return [sizes for sizes in zip(old, new, strict=True) if sizes[0] != sizes[1]]


def _check_gates(old: Decoder, new: Decoder) -> None:
  """Refuses another number of experts where a gate has no column for each."""
  gates = [moe.router.gate for blocks in old.moe_layers().values() for moe in blocks.values()]
  before, after = _likes(old.shapes, old.layer_groups), _likes(new.shapes, new.layer_groups)
  changed = any("/router/gate/" in name and before[name] != after[name] for name in before)
  for gate in gates:
    if changed and not gate.separable:
      raise InputError(
        f"the gate {type(gate).__name__} has no column for each expert, so it cannot lose or gain "
        "any; use a gate that is linear, mlp or cosine"
      )


def _check_family(old: Decoder) -> None:
  """Refuses experts of several kinds: which of them a new one is of nobody has said."""
  for s, blocks in old.moe_layers().items():
    for j, moe in blocks.items():
      dims = old.dims["stack"][s][j]["moe"]["experts"]
      shapes = old.shapes["stack"][s][j]["moe"]["experts"]
      counts = jax.tree.map(
        lambda leaf, of: dict(zip(of, leaf.shape)).get("expert", 0), shapes, dims
      )
      if set(jax.tree.leaves(counts)) - {0, moe.num_experts}:
        raise InputError(
          f"{type(moe.experts).__name__} has several kinds of experts, which surgery cannot "
          "tell apart; use a family of one kind"
        )


def _by_name(tree: Any, layer_groups: param_names.LayerGroupSizes) -> dict[str, np.ndarray]:
  return param_names.unstack(param_names.flatten(jax.device_get(tree)), layer_groups)


def _likes(tree: Any, layer_groups: param_names.LayerGroupSizes) -> Likes:
  """Returns the shape and dtype of each leaf by canonical name."""
  likes: Likes = {}
  for path, leaf in param_names.flatten(tree).items():
    several = param_names.layer_names(path, layer_groups)
    shape = leaf.shape[1:] if several else leaf.shape
    likes.update(dict.fromkeys(several or [path], jax.ShapeDtypeStruct(shape, leaf.dtype)))
  return likes


def _rebuilt(like: Any, moved: Named, layer_groups: param_names.LayerGroupSizes) -> Any:
  flat = param_names.stack(moved, list(param_names.flatten(like)), layer_groups)
  return param_names.unflatten(like, flat)
