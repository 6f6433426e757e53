"""Factors of array dims: what a program shows to be the same dim is one factor, whatever its name.

A dim is a tuple of factors, outermost first; a dim of size 1 has none. A reshape of (heads * head)
to (heads, head) splits a factor in two, everywhere; adding two arrays unites the factors of their
dims. Factors carry marks: facts that forbid, or make less welcome, that a dim be sharded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


class Factor:
  """A part of a dim; parts that were united or split since are found with `resolve`."""

  __slots__ = ("_marks", "_parts", "_same_as", "size")

  def __init__(self, size: int, *marks: str):
    self.size = size
    self._marks = set(marks)
    self._same_as: Factor | None = None
    self._parts: tuple[Factor, Factor] | None = None

  def find(self) -> Factor:
    """Returns the one that stands for all that were united with it."""
    found = self
    while found._same_as is not None:
      found = found._same_as
    return found

  @property
  def marks(self) -> frozenset[str]:
    """Its marks and those of all it was united with."""
    return frozenset(self.find()._marks)

  def mark(self, *marks: str) -> None:
    """Adds marks, also to its parts."""
    for factor in resolve((self,)):
      factor._marks.update(marks)

  def split(self, outer: int) -> tuple[Factor, Factor]:
    """Returns its two parts, of which the outer has this size."""
    root = self.find()
    assert root._parts is None and root.size % outer == 0
    root._parts = (Factor(outer, *root._marks), Factor(root.size // outer, *root._marks))
    return root._parts

  def unite(self, other: Factor) -> None:
    """Makes two factors of one size one."""
    mine, others = self.find(), other.find()
    if mine is not others:
      others._same_as = mine
      mine._marks |= others._marks


Dim = tuple[Factor, ...]
MISALIGNED = "it is cut where no device boundary can lie"


def fresh(shape: Iterable[int], *marks: str) -> list[Dim]:
  """Returns dims that nothing is known of."""
  return [(Factor(size, *marks),) if size != 1 else () for size in shape]


def resolve(dim: Sequence[Factor]) -> Dim:
  """Returns the factors of a dim as they are now."""
  found: list[Factor] = []
  for factor in dim:
    root = factor.find()
    found.extend(resolve(root._parts) if root._parts else (root,))
  return tuple(found)


def size_of(dim: Sequence[Factor]) -> int:
  """Returns the size of a dim."""
  return math.prod(factor.size for factor in dim)


def mark(dim: Sequence[Factor], *marks: str) -> None:
  """Marks all factors of a dim."""
  for factor in dim:
    factor.mark(*marks)


def unify(a: Sequence[Factor], b: Sequence[Factor]) -> None:
  """Makes two dims of one size the same, splitting the factors of either where the other does."""
  left, right = list(resolve(a)), list(resolve(b))
  while left and right:
    # What was split or united on the way is looked up again.
    left, right = list(resolve(left)), list(resolve(right))
    x, y = left[0], right[0]
    if x.size == y.size:
      x.unite(y)
      left, right = left[1:], right[1:]
    elif x.size % y.size == 0:
      x.split(y.size)
    elif y.size % x.size == 0:
      y.split(x.size)
    else:
      mark((*left, *right), MISALIGNED)
      return


def regroup(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
  """Returns the dims of an array after a reshape to these sizes."""
  if 0 in sizes:
    return fresh(sizes)
  found: list[Dim] = []
  rest = [factor for dim in dims for factor in dim]
  for at, size in enumerate(sizes):
    dim = _take(rest, size)
    if dim is None:
      mark(rest, MISALIGNED)
      return found + fresh(sizes[at:], MISALIGNED)
    found.append(dim)
  return found


def _take(rest: list[Factor], size: int) -> Dim | None:
  """Takes the first factors, of this size together, from `rest`; None where a boundary is amid."""
  taken: list[Factor] = []
  while size > 1:
    rest[:] = resolve(rest)
    first = rest[0]
    if size % first.size == 0:
      taken.append(rest.pop(0))
      size //= first.size
    elif first.size % size == 0:
      first.split(size)
    else:
      rest[:0] = taken
      return None
  return tuple(taken)
