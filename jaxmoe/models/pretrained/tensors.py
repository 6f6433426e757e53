"""Where each of our weights lies in a checkpoint, as data that is read in both directions.

`Leaf("moe/experts/gate_up", "e d g f", Form("mlp.experts.{e}.{g}_proj.weight", "f d", GATE_UP))`
says that one of our arrays, with dims e, d, g and f, is a tensor (f, d) for every pair of e and g.
Several dims side by side stand in parentheses, the last changing fastest: `(n h) d` is what a
linear layer to n heads of h keeps; `e (g f) d` has gate and up one after the other, `e d (f g)`
interleaved.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
  """

  name: str
  dims: str
  words: Words = ()


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One of our weights.

  Attributes:
    name: Its name, without `layers/N/` where `layer` is in the names of its tensors.
    dims: A letter for each dim.
    forms: How it may lie on disk; the first is what is written.
  """

  name: str
  dims: str
  forms: tuple[Form, ...]


@dataclasses.dataclass(frozen=True)
class Bound:
  """A leaf of a model: its canonical name, shape and dtype, and how its entry in the map."""

  name: str
  shape: Shape
  dtype: Any
  leaf: Leaf
  depth: int | None

  @property
  def sizes(self) -> dict[str, int]:
    """The size of each letter."""
    return dict(zip(self.leaf.dims.split(), self.shape, strict=True))

  def tensors(self, form: Form) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields the name of each tensor of a form, and which indices of the leaf it is."""
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
    sizes = self.sizes
    return tuple(int(np.prod([sizes[letter] for letter in group])) for group in _groups(form))

  def gather(self, form: Form, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Returns the leaf's values, put together from its tensors in its dtype."""
    whole = np.empty(self.shape, self.dtype)
    for name, index in self.tensors(form):
      self._view(whole, form, index)[...] = read(name).reshape(self._apart(form))
    return whole

  def scatter(self, form: Form, whole: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and values of each tensor; what `gather` puts together."""
    for name, index in self.tensors(form):
      yield name, self._view(whole, form, index).reshape(self.tensor_shape(form))

  def _apart(self, form: Form) -> Shape:
    """The shape of a tensor with no dims side by side."""
    sizes = self.sizes
    return tuple(sizes[letter] for group in _groups(form) for letter in group)

  def _view(self, whole: np.ndarray, form: Form, index: dict[str, int]) -> np.ndarray:
    """Returns what one tensor is of the leaf, with the tensor's dims, none side by side."""
    letters = self.leaf.dims.split()
    part = whole[tuple(index.get(letter, slice(None)) for letter in letters)]
    rest = [letter for letter in letters if letter not in index]
    order = [letter for group in _groups(form) for letter in group]
    return part.transpose([rest.index(letter) for letter in order])


def _groups(form: Form) -> list[list[str]]:
  """Returns the letters of each dim of a tensor."""
  return [(many or one).split() for many, one in re.findall(r"\(([^)]*)\)|(\S+)", form.dims)]


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
    bound.append(Bound(name, tuple(like.shape), np.dtype(like.dtype), entries[short], depth))
  return bound


def choose_forms(
  bound: Iterable[Bound], there: Iterable[str], ignored: Iterable[str] = ()
) -> list[tuple[Bound, Form]]:
  """Returns the form in which each weight lies in a checkpoint.

  Args:
    bound: The weights of a model.
    there: The names of the checkpoint's tensors.
    ignored: Patterns of names that may be left over.

  Raises:
    InputError: a tensor is missing, or left over; with names.
  """
  left, missing, chosen = set(there), [], []
  for one in bound:
    options = [(form, [name for name, _ in one.tensors(form)]) for form in one.leaf.forms]
    form, wanted = max(options, key=lambda option: len(left.intersection(option[1])) > 0)
    missing += [name for name in wanted if name not in left]
    left.difference_update(wanted)
    chosen.append((one, form))
  left = {name for name in left if not any(re.fullmatch(pattern, name) for pattern in ignored)}
  if missing:
    raise InputError(
      f"tensors are missing: {some(missing)}; config.json asks for them, so the checkpoint is not "
      "whole, or of another model"
    )
  if left:
    raise InputError(
      f"tensors are left over: {some(sorted(left))}; the model of config.json has no place for "
      "them, so a conversion would lose them"
    )
  return chosen


def some(names: list[str], shown: int = 4) -> str:
  """Returns the first few names, and how many more there are."""
  more = len(names) - shown
  return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
