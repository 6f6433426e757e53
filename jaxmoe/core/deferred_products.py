"""Gradients of weights that are put off: what a product by a weight leaves, and what it makes.

The gradient of a product y = f(w, x) by w needs x and dy, and nothing else of the backward pass. A
weight that stands in the parameter tree as `Tapped` multiplies as it did, and has no gradient: its
taps, zeros that are added to nothing, get x and dy as theirs. So a vjp by taps is the backward pass
without the weights' gradients, and `weight_gradients` makes these of what it found, at any time,
by the transposes that the whole vjp would have called: bit for bit the same. Loops stack taps as
they stack weights, and rules of differentiation and remat take them for any other argument; a cut
through a traced program would find nothing there to put off.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmoe.core.weight_formats import Groups, dot, grouped_dot

Taps = tuple[tuple[jax.Array, ...], ...]
"""Of each product in turn: what it is made of beside the weight, and its result; or their
gradients' places."""


@dataclasses.dataclass(frozen=True)
class SeamProduct:
  """One product by a weight, or by several at once.

  Attributes:
    function: From weights and inputs to the result; it holds no arrays.
    shapes: Of the inputs and the result.
    names: Of the weights, in order.
  """

  function: Callable[..., jax.Array]
  shapes: tuple[jax.ShapeDtypeStruct, ...]
  names: tuple[str, ...]


class ProductRecord(dict[tuple[str, int], SeamProduct]):
  """Products by the name of their first weight and their number among its; hashed as itself."""

  def __hash__(self) -> int:  # type: ignore[override]
    return id(self)

  def __eq__(self, other: object) -> bool:
    return self is other


class _Format:
  """The base of what stands in the place of a weight: it counts its products as they are traced."""

  weight: Any
  arrays_inside: ClassVar[bool] = True

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the weight."""
    return tuple(self.weight.shape)

  def number(self) -> int:
    """Returns which product of this weight is being traced, from 0."""
    count = self.__dict__.get("_count", 0)
    object.__setattr__(self, "_count", count + 1)
    return count

  def dot(self, x: jax.Array, spec: str) -> jax.Array:
    """Returns the einsum `spec` of (x, weight)."""
    return self.multiply(lambda weight, x: dot(weight, x, spec), (self,), x)

  def grouped_dot(self, rows_RD: jax.Array, groups: Groups) -> jax.Array:
    """Returns each row times the matrix of its slot."""
    counted = isinstance(groups.__dict__.get("sizes_S"), jax.Array)
    of = functools.partial(dataclasses.replace, groups, values={})  # type: ignore[type-var]

    def product(weight: jax.Array, rows_RD: jax.Array, *sizes_S: jax.Array) -> jax.Array:
      known = dict(zip(("sizes_S",), sizes_S))
      return grouped_dot(weight, rows_RD, of(**known))

    return self.multiply(product, (self,), rows_RD, *([groups.sizes_S] * counted))

  def multiply(
    self, function: Callable[..., jax.Array], weights: tuple[Any, ...], *inputs: jax.Array
  ) -> jax.Array:
    """Returns `function(*weights, *inputs)`, where `weights` begin with this one."""
    raise NotImplementedError


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["name", "record"]
)
@dataclasses.dataclass(frozen=True)
class Watched(_Format):
  """A weight whose products are written down as they are traced; any other use is an error."""

  weight: Any
  name: str
  record: ProductRecord

  def multiply(
    self, function: Callable[..., jax.Array], weights: tuple[Any, ...], *inputs: jax.Array
  ) -> jax.Array:
    """Returns the product, and writes it down."""
    result = function(*(each.weight for each in weights), *inputs)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs, result))
    product = SeamProduct(function, shapes, tuple(each.name for each in weights))
    self.record[self.name, self.number()] = product
    return result


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["weight", "taps"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Tapped(_Format):
  """A weight whose gradient is put off.

  Attributes:
    weight: The array.
    taps: Zeros of each product's shapes; none of weights that multiply behind another.
  """

  weight: Any
  taps: Taps

  def multiply(
    self, function: Callable[..., jax.Array], weights: tuple[Any, ...], *inputs: jax.Array
  ) -> jax.Array:
    """Returns the product; in the backward pass its taps get inputs and gradient."""
    taps = self.taps[self.number()]
    return _tapped(function, tuple(each.weight for each in weights), taps, inputs)


def is_format(node: Any) -> bool:
  """Whether a node of a parameter tree stands for a weight whose gradient is put off."""
  return isinstance(node, _Format)


def empty_taps(products: Mapping[tuple[str, int], SeamProduct], name: str, layers: int) -> Taps:
  """Returns the taps of a weight that is stacked over so many layers."""
  return tuple(
    tuple(jnp.zeros((layers, *x.shape), _wide(x)) for x in products[name, number].shapes)
    for number in range(sum(first == name for first, _ in products))
  )


def _wide(x: Any) -> Any:
  """Returns the dtype of a tap: integers, which have no gradient, are told as floats."""
  return x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.dtype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(function: Any, weights: Any, taps: Any, inputs: tuple[jax.Array, ...]) -> jax.Array:
  del taps
  return function(*weights, *inputs)


def _forward(function: Any, weights: Any, taps: Any, inputs: tuple[jax.Array, ...]) -> Any:
  del taps
  floats = [x for x in inputs if jnp.issubdtype(x.dtype, jnp.inexact)]

  def of_floats(*floats: jax.Array) -> jax.Array:
    given = iter(floats)
    return function(
      *weights, *(next(given) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in inputs)
    )

  result, back = jax.vjp(of_floats, *floats)
  return result, (back, inputs)


def _backward(function: Any, kept: Any, d_result: jax.Array) -> Any:
  del function
  back, inputs = kept
  given = iter(back(d_result))
  d_inputs = tuple(
    next(given) if jnp.issubdtype(x.dtype, jnp.inexact) else None for x in inputs
  )
  return None, (*(x.astype(_wide(x)) for x in inputs), d_result), d_inputs


_tapped.defvjp(_forward, _backward)


def weight_gradients(
  products: Mapping[tuple[str, int], SeamProduct],
  weights: Mapping[str, jax.Array],
  found: Mapping[str, Taps],
) -> dict[str, jax.Array]:
  """Returns the gradients of weights by name, of one layer.

  Args:
    products: Those of the weights.
    weights: The arrays.
    found: What the taps of each weight got.
  """
  grads: dict[str, jax.Array] = {}
  for (name, number), product in products.items():
    *inputs, d_result = found[name][number]
    given = [x.astype(like.dtype) for x, like in zip(inputs, product.shapes)]
    of = [weights[each] for each in product.names]
    _, back = jax.vjp(lambda *of, f=product.function, given=given: f(*of, *given), *of)
    for each, grad in zip(product.names, back(d_result)):
      grads[each] = grads[each] + grad if each in grads else grad
  return grads
