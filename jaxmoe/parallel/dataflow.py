"""Dataflow of a traced program (jaxpr): what it does with its parameters.

Every array is a Value, whose dims are of `dim_factors.py`. Products with a parameter, looked-up
rows and products of two activations are written into a Dataflow in the order of the program.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

from jaxmoe.parallel.dim_factors import Dim, fresh, mark, unify

DATA = "is a dim of the batch"
LAYERS = "counts the layers of a loop"
CUT = "is cut into parts or put together from parts"
OPAQUE = "goes through an operation that is not understood"
INSIDE = "is summed over in products of activations"
REDUCED = "is summed over"
RANKED = "has its entries compared"
INDEXED = "has single entries picked"


class ValueOrigin(enum.IntEnum):
  """What a value is made of.

  Nothing given; parameters without a product; parameters alone; the batch alone; both.
  """

  CONSTANT = 0
  WEIGHT = 1
  DERIVED = 2
  BATCH = 3
  COMPUTED = 4


@dataclasses.dataclass(frozen=True)
class Value:
  """An array of the program.

  Attributes:
    dims: Its dims.
    origin: What it is made of.
    leaves: Of a WEIGHT, the places of its parameters among the leaves of their tree.
  """

  dims: tuple[Dim, ...]
  origin: ValueOrigin
  leaves: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Product:
  """A product with a parameter, or rows looked up in one.

  Attributes:
    leaves: The parameters.
    summed: Dims of the parameter that are summed over; of a look-up, those it is looked up in.
    out: Dims of the parameter alone that the result has.
    batch: Dims that both sides and the result have, and those of groups of rows.
    lookup: Whether rows are looked up by what the batch says.
  """

  leaves: frozenset[int]
  summed: tuple[Dim, ...]
  out: tuple[Dim, ...]
  batch: tuple[Dim, ...] = ()
  lookup: bool = False


@dataclasses.dataclass(frozen=True)
class Intermediate:
  """An activation in memory.

  Attributes:
    dims: Its dims.
    dtype: Of its entries.
    eqn: The equation of the jaxpr whose result it is.
  """

  dims: tuple[Dim, ...]
  dtype: Any
  eqn: Any


@dataclasses.dataclass
class Dataflow:
  """What was found.

  Attributes:
    products: With parameters, in the order of the program.
    heads: Dims for each entry of which two activations are multiplied, as queries and keys are.
    attended: Dims of one activation alone that a product with another leaves.
    picked: Dims of parameters of which whole matrices are picked by what is computed.
    made: What products, look-ups and the like make with the batch, by the equation.
  """

  products: list[Product] = dataclasses.field(default_factory=list)
  heads: list[Dim] = dataclasses.field(default_factory=list)
  attended: list[Dim] = dataclasses.field(default_factory=list)
  picked: list[Dim] = dataclasses.field(default_factory=list)
  made: dict[int, Intermediate] = dataclasses.field(default_factory=dict)


Values = list[Value]
Rule = Callable[[Dataflow, Any, Values], Values]


def constant(shape: Sequence[int]) -> Value:
  """Returns an array of which nothing is known."""
  return Value(tuple(fresh(shape)), ValueOrigin.CONSTANT)


def combine(values: Sequence[Value], dims: Sequence[Dim]) -> Value:
  """Returns a value of these dims, made of these values without a product."""
  origins = {value.origin for value in values} or {ValueOrigin.CONSTANT}
  of_params = origins & {ValueOrigin.WEIGHT, ValueOrigin.DERIVED}
  of_batch = origins & {ValueOrigin.BATCH, ValueOrigin.COMPUTED}
  origin = ValueOrigin.COMPUTED if of_params and of_batch else max(origins)
  if not of_batch and ValueOrigin.WEIGHT in origins:
    origin = ValueOrigin.WEIGHT
  leaves = frozenset[int]().union(*(value.leaves for value in values))
  return Value(tuple(dims), origin, leaves if origin == ValueOrigin.WEIGHT else frozenset())


def merge(a: Value, b: Value) -> Value:
  """Returns what is either of two values."""
  for dim, other in zip(a.dims, b.dims):
    unify(dim, other)
  return combine([a, b], a.dims)


def multiply(
  dataflow: Dataflow, sides: Values, numbers: Any, groups: tuple[Dim, ...] = ()
) -> Value:
  """Returns the product of two values and writes it down.

  Args:
    dataflow: Where it is written.
    sides: The values.
    numbers: ((summed of the left, of the right), (batch of the left, of the right)).
    groups: Dims of the right side each entry of which is multiplied with rows of its own.
  """
  summed, batch = numbers
  for of_left, of_right in (*zip(*summed), *zip(*batch)):
    unify(sides[0].dims[of_left], sides[1].dims[of_right])
  free = [
    tuple(
      dim for at, dim in enumerate(side.dims)
      if at not in (*summed[i], *batch[i]) and not (groups and dim in groups)
    )
    for i, side in enumerate(sides)
  ]  # fmt: skip
  shared = tuple(sides[0].dims[at] for at in batch[0])
  dims, origins = (*shared, *free[0], *free[1]), [side.origin for side in sides]
  if min(origins) == ValueOrigin.CONSTANT and max(origins) != ValueOrigin.WEIGHT:
    return Value(dims, max(origins))
  for i, side in enumerate(sides):
    if side.origin == ValueOrigin.WEIGHT:
      inner = tuple(side.dims[at] for at in summed[i])
      # Of two parameters neither is what the other's result would lie along.
      out = free[i] if origins[1 - i] > ValueOrigin.WEIGHT else ()
      dataflow.products.append(Product(side.leaves, inner, out, (*shared, *groups)))
  if min(origins) > ValueOrigin.WEIGHT:
    _attend(dataflow, tuple(sides[0].dims[at] for at in summed[0]), shared, free)
  return Value(
    dims, ValueOrigin.COMPUTED if max(origins) >= ValueOrigin.BATCH else ValueOrigin.DERIVED
  )


def _attend(
  dataflow: Dataflow, inner: tuple[Dim, ...], shared: tuple[Dim, ...], free: list[Any]
) -> None:
  """Writes down a product of activations."""
  for dim in inner:
    mark(dim, INSIDE)
  if any(inner) and any(free[0]) and any(free[1]):
    dataflow.heads.extend(shared)
  if not any(DATA in factor.marks for dim in inner for factor in dim):
    dataflow.attended.extend((*free[0], *free[1]))
