"""The weights of a stage whose gradients can be put off, and what is kept until they are made.

Those whose every use is a product of the weight seam (`core/deferred_products.py`) can: a trace of
the stage finds them. The others, scales and what is no matrix, have theirs with the gradient of the
stage's input. What is kept differs from stage to stage: in a slot it lies flat, by dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core import param_names
from jaxmoe.core.deferred_products import (
  ProductRecord,
  SeamProduct,
  Tapped,
  Taps,
  Watched,
  empty_taps,
  weight_gradients,
)
from jaxmoe.models.transformer import Params

SeamProducts = Mapping[tuple[str, int], SeamProduct]
RunTaps = list[dict[str, Taps]]
"""Of each run, by name of a weight: what its taps got."""


@dataclasses.dataclass(frozen=True)
class DeferredWeights:
  """The weights of a stage whose gradients are put off.

  Attributes:
    products: By run.
    gathers: By run: makes the leaves of one layer ready for products; linear.
  """

  products: Sequence[SeamProducts]
  gathers: Sequence[Callable[[Params], Params]]

  def names(self, run: int) -> set[str]:
    """Returns the names of a run's weights whose gradients are put off."""
    return {name for product in self.products[run].values() for name in product.names}

  def taps(self, weights: list[Params]) -> RunTaps:
    """Returns taps for the stage's weights."""
    return [
      {name: empty_taps(products, name, _layers(tree)) for name in self.names(run)}
      for run, (products, tree) in enumerate(zip(self.products, weights, strict=True))
    ]

  def tapped(self, weights: list[Params], taps: RunTaps) -> list[Params]:
    """Returns the stage's weights with taps on those whose gradients are put off."""
    return [
      _replaced(tree, {name: Tapped(flat[name], of) for name, of in mine.items()})
      for tree, mine in zip(weights, taps, strict=True)
      for flat in [param_names.flatten(tree)]
    ]

  def kept_off(self, weights: list[Params]) -> list[Params]:
    """Returns the stage's weights, those whose gradients are put off without a gradient."""
    return [
      _replaced(
        tree, {name: jax.lax.stop_gradient(flat[name]) for name in self.names(run)}
      )
      for run, tree in enumerate(weights)
      for flat in [param_names.flatten(tree)]
    ]

  def gradients(self, weights: list[Params], found: RunTaps) -> list[Params]:
    """Returns the gradients of the stage's weights that were put off; zeros of the others."""
    grads = []
    for products, gather, tree, taps in zip(self.products, self.gathers, weights, found):

      def of_layer(
        _: None, given: tuple[Params, dict[str, Taps]],
        products: SeamProducts = products, gather: Callable[[Params], Params] = gather,
      ) -> tuple[None, Params]:
        stored, taps = given
        ready, back = jax.vjp(gather, stored)
        flat = param_names.flatten(ready)
        made = weight_gradients(products, flat, taps)
        whole = {name: made.get(name, jnp.zeros_like(leaf)) for name, leaf in flat.items()}
        return None, back(param_names.unflatten(ready, whole))[0]

      grads.append(jax.lax.scan(of_layer, None, (tree, taps))[1])
    return grads


def find_deferred(
  trace: Callable[[list[Params]], Any], weights: list[Params],
  gathers: Sequence[Callable[[Params], Params]],
) -> DeferredWeights:  # fmt: skip
  """Returns the weights of a stage whose gradients can be put off.

  Args:
    trace: Computes the stage with these weights.
    weights: Of each run.
    gathers: See DeferredWeights.
  """
  every = [
    (run, name)
    for run, tree in enumerate(weights)
    for name, leaf in param_names.flatten(tree).items()
    if leaf.ndim > 2 and "router" not in name.split("/")
  ]
  found = _watch(trace, weights, every)
  if found is None:  # some are used otherwise
    alone = [(one, _watch(trace, weights, [one])) for one in every]
    found = _watch(trace, weights, [one for one, seen in alone if seen is not None])
  assert found is not None, "weights that can be put off one by one can be together"
  return DeferredWeights(found, gathers)


def _watch(
  trace: Callable[[list[Params]], Any], weights: list[Params], chosen: list[tuple[int, str]]
) -> list[ProductRecord] | None:
  """Returns the products of the weights that were chosen, by run; None if one is used otherwise."""
  records = [ProductRecord() for _ in weights]
  watched = []
  for run, (tree, record) in enumerate(zip(weights, records, strict=True)):
    flat = param_names.flatten(tree)
    names = [name for at, name in chosen if at == run]
    watched.append(_replaced(tree, {name: Watched(flat[name], name, record) for name in names}))
  try:
    jax.eval_shape(lambda: trace(watched))
  except (TypeError, AttributeError, KeyError, IndexError):
    return None
  seen = {(run, name) for run, of in enumerate(records) for p in of.values() for name in p.names}
  return records if seen == set(chosen) else None


@dataclasses.dataclass(frozen=True)
class FlatSlot:
  """How trees of any shapes lie in slots of one shape: an array for each dtype.

  Attributes:
    sizes: The entries that a slot has, by name of a dtype.
  """

  sizes: Mapping[str, int]

  @classmethod
  def of(cls, trees: Sequence[Any]) -> FlatSlot:
    """Returns slots in which any of these trees of shapes finds room."""
    sizes: dict[str, int] = {}
    for tree in trees:
      for name, size in _sizes(tree).items():
        sizes[name] = max(size, sizes.get(name, 0))
    return cls(sizes)

  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of what lies in a slot."""
    return {name: jax.ShapeDtypeStruct((size,), name) for name, size in self.sizes.items()}

  def pack(self, tree: Any) -> dict[str, jax.Array]:
    """Returns a tree as it lies in a slot."""
    packed = {}
    for name, size in self.sizes.items():
      parts = [leaf.reshape(-1) for leaf in jax.tree.leaves(tree) if leaf.dtype.name == name]
      used = sum(part.size for part in parts)
      packed[name] = jnp.concatenate([*parts, jnp.zeros(size - used, name)])
    return packed

  def unpack(self, packed: Mapping[str, jax.Array], like: Any) -> Any:
    """Returns the tree of the shapes of `like` that lies in a slot."""
    at = dict.fromkeys(self.sizes, 0)
    leaves = []
    for leaf in jax.tree.leaves(like):
      name, size = leaf.dtype.name, math.prod(leaf.shape)
      leaves.append(packed[name][at[name] : at[name] + size].reshape(leaf.shape))
      at[name] += size
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _sizes(tree: Any) -> dict[str, int]:
  sizes: dict[str, int] = {}
  for leaf in jax.tree.leaves(tree):
    sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + math.prod(leaf.shape)
  return sizes


def _layers(tree: Params) -> int:
  return int(jax.tree.leaves(tree)[0].shape[0])


def _replaced(tree: Params, others: Mapping[str, Any]) -> Params:
  """Returns a tree with others in the place of some leaves, by path."""
  flat = {**param_names.flatten(tree), **others}
  return jax.tree.unflatten(jax.tree.structure(tree), [flat[p] for p in param_names.flatten(tree)])
