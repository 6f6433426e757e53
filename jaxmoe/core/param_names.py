"""The names of one layer, `layers/7/moe/experts/down`, whatever a run does in memory.

In memory the blocks of a stack are grouped for `scan`: layer group s holds a pattern of blocks that
repeats, and leaf `stack/s/j/...` stacks the j-th block of the pattern over its repeats, in dim 0.
Files, tools, digests and surgery see canonical names, one for each layer. This file is the only
one that knows both. The same holds for any tree that contains parameter trees, such as optimizer
state: the pieces `stack/s/j` may stand anywhere in a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError

LayerGroupSizes = tuple[tuple[int, int], ...]
"""For each layer group of a stack: (blocks in its pattern, repeats of the pattern)."""

STACK, LAYERS = "stack", "layers"
MOE, ATTENTION = "moe", "attention"  # the parts of a block that may have a router


class LayerAddress(NamedTuple):
  """The place of a part with a router in a stack: of all repeats of a position of a pattern.

  Attributes:
    group: The layer group.
    position: Of the block in the group's pattern.
    part: Of the block, MOE or ATTENTION.
  """

  group: str
  position: str
  part: str = MOE

  @classmethod
  def parse(cls, group: str, place: str) -> LayerAddress:
    """Returns the address of what is kept in a group under `place`."""
    position, dot, part = place.partition(".")
    return cls(group, position, part if dot else MOE)

  @property
  def place(self) -> str:
    """What sums of the part are kept under in the group: 1, or 1.attention."""
    return self.position if self.part == MOE else f"{self.position}.{self.part}"

  @property
  def path(self) -> str:
    """The path of the part's leaves, stacked over repeats."""
    return f"{STACK}/{self.group}/{self.position}/{self.part}"

  @property
  def gate_path(self) -> str:
    """The path of the parameters of the part's gate."""
    return f"{self.path}/router/gate"


def flatten(tree: Any) -> dict[str, Any]:
  """Returns {path: leaf} of nested dicts, tuples and records, pieces joined by '/'."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {"/".join(_piece(entry) for entry in path): leaf for path, leaf in leaves}


def unflatten(like: Any, flat: Mapping[str, Any]) -> Any:
  """Returns a tree of the structure of `like` with the leaves of `flat`, by path."""
  treedef = jax.tree.structure(like)
  return jax.tree.unflatten(treedef, [flat[path] for path in flatten(like)])


def layer_names(path: str, layer_groups: LayerGroupSizes) -> list[str] | None:
  """Returns the canonical names behind a stacked leaf, in order of dim 0; None if not stacked."""
  pieces = path.split("/")
  if STACK not in pieces:
    return None
  at = pieces.index(STACK)
  group, position = int(pieces[at + 1]), int(pieces[at + 2])
  first = sum(blocks * repeats for blocks, repeats in layer_groups[:group])
  blocks, repeats = layer_groups[group]
  before, after = pieces[:at], pieces[at + 3 :]
  layers = [first + repeat * blocks + position for repeat in range(repeats)]
  return ["/".join([*before, LAYERS, str(layer), *after]) for layer in layers]


def canonical_name(path: str, layer_groups: LayerGroupSizes) -> str:
  """Returns the canonical name of a leaf; of a stacked one, the name of its first layer."""
  names = layer_names(path, layer_groups)
  return path if names is None else names[0]


def unstack(flat: Mapping[str, Any], layer_groups: LayerGroupSizes) -> dict[str, Any]:
  """Returns the leaves by canonical name: every stacked leaf is cut along dim 0."""
  cut: dict[str, Any] = {}
  for path, leaf in flat.items():
    names = layer_names(path, layer_groups)
    if names is None:
      cut[path] = leaf
    else:
      cut.update((name, leaf[row]) for row, name in enumerate(names))
  return cut


def stack(
  named: Mapping[str, Any], paths: list[str], layer_groups: LayerGroupSizes
) -> dict[str, Any]:
  """Returns the leaves at `paths`, the inverse of `unstack`.

  Raises:
    InputError: a name that a path needs is missing.
  """
  flat = {}
  for path in paths:
    names = layer_names(path, layer_groups)
    missing = [name for name in names or [path] if name not in named]
    if missing:
      raise InputError(f"{missing[0]!r} is missing ({len(missing)} in all): another model's tree")
    flat[path] = named[path] if names is None else jnp.stack([named[name] for name in names])
  return flat


def by_layer(
  blocks: Mapping[str, Mapping[str, Any]], layer_groups: LayerGroupSizes, part: str = MOE
) -> dict[int, Any]:
  """Returns {depth: values of that layer} of trees by group and position, stacked over repeats.

  A position whose tree is None has no layers. `part` is that of blocks whose values are asked for.
  """
  layers: dict[int, Any] = {}
  for s, positions in blocks.items():
    first = sum(width * repeats for width, repeats in layer_groups[: int(s)])
    width, repeats = layer_groups[int(s)]
    for place, values in positions.items():
      address = LayerAddress.parse(s, place)
      if address.part != part:
        continue
      for repeat in range(repeats if values is not None else 0):
        depth = first + repeat * width + int(address.position)
        layers[depth] = jax.tree.map(lambda leaf, r=repeat: leaf[r], values)
  return dict(sorted(layers.items()))


def _piece(entry: Any) -> str:
  for attribute in ("key", "name", "idx"):
    if hasattr(entry, attribute):
      return str(getattr(entry, attribute))
  raise TypeError(f"no name for the tree entry {entry!r}")
