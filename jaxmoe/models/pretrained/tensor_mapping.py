"""The mapping of weights to tensors of a checkpoint, as data that is read both ways.

    layout = TensorLayout("mlp.experts.{e}.{g}_proj.weight", "f d", GATE_UP)
    ParamMapping("moe/experts/gate_up", "e d g f", (layout,))

says that one of our arrays, with dims e, d, g and f, is a tensor (f, d) for every pair of e and g.
Several dims side by side stand in parentheses, the last changing fastest: `(n h) d` is what a
linear layer to n heads of h keeps; `e (g f) d` has gate and up one after the other, `e d (f g)`
interleaved. `(n h+v) c` has for each n first h, then v, which is a dim of another parameter.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.core.param_names import LAYERS

Shape = tuple[int, ...]
IndexNames = tuple[tuple[str, tuple[str, ...]], ...]
GATE_UP: IndexNames = (("g", ("gate", "up")),)


@dataclasses.dataclass(frozen=True)
class TensorLayout:
  """One way in which a weight lies on disk.

  Attributes:
    name: Of the tensor. {layer} is the depth; a letter in braces is a dim of the parameter, and
      there is a tensor for each index.
    dims: The tensor's dims, in letters of the parameter.
    index_names: What stands for the indices of a letter, where that is not their number.
    needs: Another parameter of the layer, without which there is no such layout.
  """

  name: str
  dims: str
  index_names: IndexNames = ()
  needs: str = ""

  @property
  def groups(self) -> list[list[str]]:
    """What lies side by side in each dim of a tensor."""
    return [(many or one).split() for many, one in re.findall(r"\(([^)]*)\)|(\S+)", self.dims)]


@dataclasses.dataclass(frozen=True)
class ParamMapping:
  """Where one of our parameters lies on disk.

  Attributes:
    name: Its name, without `layers/N/` where `layer` is in the names of its tensors.
    dims: A letter for each dim.
    layouts: How it may lie on disk; the first is what is written. One without layouts is zero and
      lies nowhere.
  """

  name: str
  dims: str
  layouts: tuple[TensorLayout, ...]


@dataclasses.dataclass(frozen=True)
class TensorSlice:
  """The part of a tensor that one parameter is.

  Attributes:
    name: Of the tensor.
    apart: The tensor's shape with no dims side by side.
    place: Where in that the parameter's values are; all of it, or a range of one dim.
    values: They.
  """

  name: str
  apart: Shape
  place: tuple[slice, ...]
  values: np.ndarray


@dataclasses.dataclass(frozen=True)
class BoundParam:
  """A parameter of a model, and where it lies on disk.

  Attributes:
    name: Its canonical name.
    shape: Its shape.
    dtype: Its dtype.
    mapping: Its entry in the map.
    depth: Of its layer, None outside of layers.
    beside: The sizes of letters of other parameters that lie in the same tensors.
  """

  name: str
  shape: Shape
  dtype: Any
  mapping: ParamMapping
  depth: int | None
  beside: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @property
  def sizes(self) -> dict[str, int]:
    """The size of each letter."""
    return dict(zip(self.mapping.dims.split(), self.shape, strict=True))

  @property
  def layout(self) -> TensorLayout | None:
    """The layout that is written."""
    return self.mapping.layouts[0] if self.mapping.layouts else None

  def tensors(self, layout: TensorLayout | None) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields the name of each tensor of a layout, and which indices of the parameter it is."""
    if layout is None:
      return
    words, sizes = dict(layout.index_names), self.sizes
    named = [letter for letter in sizes if "{" + letter + "}" in layout.name]
    for indices in itertools.product(*(range(sizes[letter]) for letter in named)):
      index = dict(zip(named, indices))
      spelt = {
        letter: words[letter][at] if letter in words else str(at) for letter, at in index.items()
      }
      yield layout.name.format(layer=self.depth, **spelt), index

  def tensor_shape(self, layout: TensorLayout) -> Shape:
    """Returns the shape of each tensor of a layout."""
    return tuple(math.prod(map(self._size, group)) for group in layout.groups)

  def gather(self, layout: TensorLayout | None, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Returns the parameter's values, put together from its tensors in its dtype."""
    if layout is None:
      return np.zeros(self.shape, self.dtype)
    whole = np.empty(self.shape, self.dtype)
    for piece in self.slices(layout, whole):
      piece.values[...] = read(piece.name).reshape(piece.apart)[piece.place]
    return whole

  def slices(self, layout: TensorLayout, whole: np.ndarray) -> Iterator[TensorSlice]:
    """Yields the parameter's part of each tensor; values are views of `whole`."""
    terms = [term for group in layout.groups for term in group]
    apart = tuple(map(self._size, terms))
    place = tuple(map(self._place, terms))
    order = [next(letter for letter in term.split("+") if letter in self.sizes) for term in terms]
    letters = self.mapping.dims.split()
    for name, index in self.tensors(layout):
      part = whole[tuple(index.get(letter, slice(None)) for letter in letters)]
      rest = [letter for letter in letters if letter not in index]
      values = part.transpose([rest.index(letter) for letter in order])
      yield TensorSlice(name, apart, place, values)

  def _size(self, term: str) -> int:
    """Returns the size of a dim of a tensor, such as h or h+v."""
    sizes = {**self.beside, **self.sizes}
    return sum(sizes[letter] for letter in term.split("+"))

  def _place(self, term: str) -> slice:
    """Returns which part of a dim of a tensor the parameter has."""
    start = 0
    for letter in term.split("+"):
      if letter in self.sizes:
        return slice(start, start + self.sizes[letter])
      start += self.beside[letter]
    raise AssertionError(f"{self.name} has no dim of {term}")


def bind_params(mappings: Iterable[ParamMapping], shapes: Mapping[str, Any]) -> list[BoundParam]:
  """Returns the entry of each of a model's weights, in the order of `shapes`.

  Args:
    mappings: Those of a family.
    shapes: Shape and dtype of each weight by canonical name.
  """
  entries = {mapping.name: mapping for mapping in mappings}
  bound = []
  for name, like in shapes.items():
    pieces, depth, short = name.split("/"), None, name
    if pieces[0] == LAYERS:
      depth, short = int(pieces[1]), "/".join(pieces[2:])
    assert short in entries, f"the family's map has no {short}"
    before = name.removesuffix(short)
    layouts = tuple(f for f in entries[short].layouts if not f.needs or before + f.needs in shapes)
    mapping = dataclasses.replace(entries[short], layouts=layouts)
    bound.append(BoundParam(name, tuple(like.shape), np.dtype(like.dtype), mapping, depth))
  shared: dict[tuple[int | None, str], dict[str, int]] = {}
  for one in bound:
    for layout in one.mapping.layouts:
      shared.setdefault((one.depth, layout.name), {}).update(one.sizes)
  return [
    dataclasses.replace(one, beside=shared[one.depth, one.layout.name]) if one.layout else one
    for one in bound
  ]


def choose_layouts(
  bound: Iterable[BoundParam], there: Collection[str], ignored: Iterable[str] = ()
) -> list[tuple[BoundParam, TensorLayout | None]]:
  """Returns the layout in which each weight lies in a checkpoint.

  Args:
    bound: The weights of a model.
    there: The names of the checkpoint's tensors.
    ignored: Patterns of names that may be left over.

  Raises:
    InputError: a tensor is missing, or left over; with names.
  """
  found, missing = set(there), []
  used: set[str] = set()
  chosen: list[tuple[BoundParam, TensorLayout | None]] = []
  for one in bound:
    if one.layout is None:
      chosen.append((one, None))
      continue
    options = [
      (layout, [name for name, _ in one.tensors(layout)]) for layout in one.mapping.layouts
    ]
    layout, wanted = max(options, key=lambda option: not found.isdisjoint(option[1]))
    missing += [name for name in wanted if name not in found]
    used.update(wanted)
    chosen.append((one, layout))
  left = [
    name for name in sorted(found - used)
    if not any(re.fullmatch(pattern, name) for pattern in ignored)
  ]  # fmt: skip
  if missing:
    raise InputError(
      f"tensors are missing: {some(missing)}; config.json asks for them, so the checkpoint is not "
      "whole, or of another model"
    )
  if left:
    raise InputError(
      f"tensors are left over: {some(left)}; the model of config.json has no place for them, so a "
      "conversion would lose them"
    )
  return chosen


def some(names: list[str], shown: int = 4) -> str:
  """Returns the first few names, and how many more there are."""
  more = len(names) - shown
  return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
