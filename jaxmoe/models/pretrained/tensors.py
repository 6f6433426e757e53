"""Where each of our weights lies in a checkpoint, as data that is read in both directions.

`Leaf("moe/experts/gate_up", "e d g f", Form("mlp.experts.{e}.{g}_proj.weight", "f d", GATE_UP))`
says that one of our arrays, with dims e, d, g and f, is a tensor (f, d) for every pair of e and g.
Several dims side by side stand in parentheses, the last changing fastest: `(n h) d` is what a
linear layer to n heads of h keeps; `e (g f) d` has gate and up one after the other, `e d (f g)`
interleaved. `(n h+v) c` has for each n first h, then v, which is a dim of another leaf.
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
from jaxmoe.core.names import LAYERS

Shape = tuple[int, ...]
Words = tuple[tuple[str, tuple[str, ...]], ...]
GATE_UP: Words = (("g", ("gate", "up")),)


@dataclasses.dataclass(frozen=True)
class Form:
  """One way in which a weight lies on disk.

  Attributes:
    name: Of the tensor. {layer} is the depth; a letter in braces is a dim of the leaf, and there is
      a tensor for each index.
    dims: The tensor's dims, in letters of the leaf.
    words: What stands for the indices of a letter, where that is not their number.
    needs: Another leaf of the layer, without which there is no such form.
  """

  name: str
  dims: str
  words: Words = ()
  needs: str = ""

  @property
  def groups(self) -> list[list[str]]:
    """What lies side by side in each dim of a tensor."""
    return [(many or one).split() for many, one in re.findall(r"\(([^)]*)\)|(\S+)", self.dims)]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One of our weights.

  Attributes:
    name: Its name, without `layers/N/` where `layer` is in the names of its tensors.
    dims: A letter for each dim.
    forms: How it may lie on disk; the first is what is written. One without forms is zero and lies
      nowhere.
  """

  name: str
  dims: str
  forms: tuple[Form, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
  """What one leaf is of a tensor.

  Attributes:
    name: Of the tensor.
    apart: The tensor's shape with no dims side by side.
    place: Where in that the leaf's values are; all of it, or a range of one dim.
    values: They.
  """

  name: str
  apart: Shape
  place: tuple[slice, ...]
  values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Bound:
  """A leaf of a model.

  Attributes:
    name: Its canonical name.
    shape: Its shape.
    dtype: Its dtype.
    leaf: Its entry in the map.
    depth: Of its layer, None outside of layers.
    beside: The sizes of letters of other leaves that lie in the same tensors.
  """

  name: str
  shape: Shape
  dtype: Any
  leaf: Leaf
  depth: int | None
  beside: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @property
  def sizes(self) -> dict[str, int]:
    """The size of each letter."""
    return dict(zip(self.leaf.dims.split(), self.shape, strict=True))

  @property
  def form(self) -> Form | None:
    """The form that is written."""
    return self.leaf.forms[0] if self.leaf.forms else None

  def tensors(self, form: Form | None) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields the name of each tensor of a form, and which indices of the leaf it is."""
    if form is None:
      return
    words, sizes = dict(form.words), self.sizes
    named = [letter for letter in sizes if "{" + letter + "}" in form.name]
    for indices in itertools.product(*(range(sizes[letter]) for letter in named)):
      index = dict(zip(named, indices))
      spelt = {
        letter: words[letter][at] if letter in words else str(at) for letter, at in index.items()
      }
      yield form.name.format(layer=self.depth, **spelt), index

  def tensor_shape(self, form: Form) -> Shape:
    """Returns the shape of each tensor of a form."""
    return tuple(math.prod(map(self._size, group)) for group in form.groups)

  def gather(self, form: Form | None, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Returns the leaf's values, put together from its tensors in its dtype."""
    if form is None:
      return np.zeros(self.shape, self.dtype)
    whole = np.empty(self.shape, self.dtype)
    for piece in self.scatter(form, whole):
      piece.values[...] = read(piece.name).reshape(piece.apart)[piece.place]
    return whole

  def scatter(self, form: Form, whole: np.ndarray) -> Iterator[Piece]:
    """Yields what the leaf is of each tensor; values are views of `whole`."""
    terms = [term for group in form.groups for term in group]
    apart = tuple(map(self._size, terms))
    place = tuple(map(self._place, terms))
    order = [next(letter for letter in term.split("+") if letter in self.sizes) for term in terms]
    letters = self.leaf.dims.split()
    for name, index in self.tensors(form):
      part = whole[tuple(index.get(letter, slice(None)) for letter in letters)]
      rest = [letter for letter in letters if letter not in index]
      yield Piece(name, apart, place, part.transpose([rest.index(letter) for letter in order]))

  def _size(self, term: str) -> int:
    """Returns the size of a dim of a tensor, such as h or h+v."""
    sizes = {**self.beside, **self.sizes}
    return sum(sizes[letter] for letter in term.split("+"))

  def _place(self, term: str) -> slice:
    """Returns which part of a dim of a tensor the leaf has."""
    start = 0
    for letter in term.split("+"):
      if letter in self.sizes:
        return slice(start, start + self.sizes[letter])
      start += self.beside[letter]
    raise AssertionError(f"{self.name} has no dim of {term}")


def bind(leaves: Iterable[Leaf], shapes: Mapping[str, Any]) -> list[Bound]:
  """Returns the entry of each of a model's weights, in the order of `shapes`.

  Args:
    leaves: The map of a family.
    shapes: Shape and dtype of each weight by canonical name.
  """
  entries = {leaf.name: leaf for leaf in leaves}
  bound = []
  for name, like in shapes.items():
    pieces, depth, short = name.split("/"), None, name
    if pieces[0] == LAYERS:
      depth, short = int(pieces[1]), "/".join(pieces[2:])
    assert short in entries, f"the family's map has no {short}"
    before = name.removesuffix(short)
    forms = tuple(f for f in entries[short].forms if not f.needs or before + f.needs in shapes)
    leaf = dataclasses.replace(entries[short], forms=forms)
    bound.append(Bound(name, tuple(like.shape), np.dtype(like.dtype), leaf, depth))
  shared: dict[tuple[int | None, str], dict[str, int]] = {}
  for one in bound:
    for form in one.leaf.forms:
      shared.setdefault((one.depth, form.name), {}).update(one.sizes)
  return [
    dataclasses.replace(one, beside=shared[one.depth, one.form.name]) if one.form else one
    for one in bound
  ]


def choose_forms(
  bound: Iterable[Bound], there: Collection[str], ignored: Iterable[str] = ()
) -> list[tuple[Bound, Form | None]]:
  """Returns the form in which each weight lies in a checkpoint.

  Args:
    bound: The weights of a model.
    there: The names of the checkpoint's tensors.
    ignored: Patterns of names that may be left over.

  Raises:
    InputError: a tensor is missing, or left over; with names.
  """
  found, missing = set(there), []
  used: set[str] = set()
  chosen: list[tuple[Bound, Form | None]] = []
  for one in bound:
    if one.form is None:
      chosen.append((one, None))
      continue
    options = [(form, [name for name, _ in one.tensors(form)]) for form in one.leaf.forms]
    form, wanted = max(options, key=lambda option: not found.isdisjoint(option[1]))
    missing += [name for name in wanted if name not in found]
    used.update(wanted)
    chosen.append((one, form))
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
