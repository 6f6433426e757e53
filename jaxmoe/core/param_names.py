"""The names of one layer, `layers/7/moe/experts/down`, whatever a run does in memory.

In memory the blocks of a stack are grouped for `scan`: layer group s holds a pattern of blocks that
repeats, and leaf `stack/s/j/...` stacks the j-th block of the pattern over its repeats, in dim 0.
Files, tools, digests and surgery see canonical names, one for each layer. This file is the only
one that knows both. The same holds for any tree that contains parameter trees, such as optimizer
state: the pieces `stack/s/j` may stand anywhere in a path.

Where layers lie over the stages of a pipeline, dim 0 is cut into equal parts, one for each device:
it then has an order of its own, and empty places where a device has fewer layers than another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError


class PlacedGroup(NamedTuple):
  """A layer group whose repeats lie in memory in an order of their own.

  Attributes:
    blocks: In its pattern.
    repeats: Of the pattern.
    rows: Which repeat lies at each place of dim 0, by position of the pattern; EMPTY for none.
  """

  blocks: int
  repeats: int
  rows: tuple[tuple[int, ...], ...]


LayerGroupSizes = tuple[tuple[int, int] | PlacedGroup, ...]
"""For each layer group of a stack: (blocks in its pattern, repeats of the pattern), in order."""

EMPTY = -1
"""The repeat that lies at a place of no layer; its canonical name is the empty string."""
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


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
  """Returns {path: leaf} of nested dicts, tuples and records, pieces joined by '/'.

  Args:
    tree: What is flattened.
    is_leaf: What is not to be looked into.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
  return {"/".join(_piece(entry) for entry in path): leaf for path, leaf in leaves}


def unflatten(like: Any, flat: Mapping[str, Any]) -> Any:
  """Returns a tree of the structure of `like` with the leaves of `flat`, by path."""
  treedef = jax.tree.structure(like)
  return jax.tree.unflatten(treedef, [flat[path] for path in flatten(like)])


def layer_depths(group: int, position: int, layer_groups: LayerGroupSizes) -> list[int]:
  """Returns the depth of the layer at each place of dim 0 of a position's leaves, or EMPTY."""
  first = sum(size[0] * size[1] for size in layer_groups[:group])
  size = layer_groups[group]
  rows = size.rows[position] if isinstance(size, PlacedGroup) else range(size[1])
  return [EMPTY if row == EMPTY else first + row * size[0] + position for row in rows]


def layer_names(path: str, layer_groups: LayerGroupSizes) -> list[str] | None:
  """Returns the canonical names behind a stacked leaf, in order of dim 0; None if not stacked.

  That of an empty place is the empty string.
  """
  pieces = path.split("/")
  if STACK not in pieces:
    return None
  at = pieces.index(STACK)
  before, after = pieces[:at], pieces[at + 3 :]
  return [
    "" if layer == EMPTY else "/".join([*before, LAYERS, str(layer), *after])
    for layer in layer_depths(int(pieces[at + 1]), int(pieces[at + 2]), layer_groups)
  ]


def canonical_name(path: str, layer_groups: LayerGroupSizes) -> str:
  """Returns the canonical name of a leaf; of a stacked one, the name of its first layer."""
  names = layer_names(path, layer_groups)
  return path if names is None else next(name for name in names if name)


def num_entries(flat: Mapping[str, Any], layer_groups: LayerGroupSizes) -> int:
  """Returns how many numbers leaves of these paths hold, those of empty places aside."""
  total = 0
  for path, leaf in flat.items():
    names = layer_names(path, layer_groups)
    total += leaf.size if names is None else leaf.size // len(names) * sum(map(bool, names))
  return total


def unstack(flat: Mapping[str, Any], layer_groups: LayerGroupSizes) -> dict[str, Any]:
  """Returns the leaves by canonical name: every stacked leaf is cut along dim 0."""
  cut: dict[str, Any] = {}
  for path, leaf in flat.items():
    names = layer_names(path, layer_groups)
    if names is None:
      cut[path] = leaf
    else:
      cut.update((name, leaf[row]) for row, name in enumerate(names) if name)
  return cut


def stack(
  named: Mapping[str, Any], paths: list[str], layer_groups: LayerGroupSizes
) -> dict[str, Any]:
  """Returns the leaves at `paths`, the inverse of `unstack`; empty places are zeros.

  Raises:
    InputError: a name that a path needs is missing.
  """
  flat = {}
  for path in paths:
    names = layer_names(path, layer_groups)
    missing = [name for name in names or [path] if name and name not in named]
    if missing:
      raise InputError(f"{missing[0]!r} is missing ({len(missing)} in all): another model's tree")
    if names is None:
      flat[path] = named[path]
      continue
    empty = jnp.zeros_like(named[next(name for name in names if name)])
    flat[path] = jnp.stack([named[name] if name else empty for name in names])
  return flat


def by_layer(
  blocks: Mapping[str, Mapping[str, Any]], layer_groups: LayerGroupSizes, part: str = MOE
) -> dict[int, Any]:
  """Returns {depth: values of that layer} of trees by group and position, stacked over repeats.

  A position whose tree is None has no layers. `part` is that of blocks whose values are asked for.
  """
  layers: dict[int, Any] = {}
  for s, positions in blocks.items():
    for place, values in positions.items():
      address = LayerAddress.parse(s, place)
      if address.part != part or values is None:
        continue
      for row, depth in enumerate(layer_depths(int(s), int(address.position), layer_groups)):
        if depth != EMPTY:
          layers[depth] = jax.tree.map(lambda leaf, r=row: leaf[r], values)
  return dict(sorted(layers.items()))


def _piece(entry: Any) -> str:
  for attribute in ("key", "name", "idx"):
    if hasattr(entry, attribute):
      return str(getattr(entry, attribute))
  raise TypeError(f"no name for the tree entry {entry!r}")
