"""Calls of Pallas kernels at the sizes of public models, which look-ahead compiles, and their work.

The least work is each product forward and the two of its gradients, nothing made again. What
kernels do is counted from their own text: products of a step, times the steps that make some.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.backends import Backend
from jaxmoe.ops import attention, cross_entropy, grouped_matmul, stick_breaking
from jaxmoe.ops.attention import Sight
from jaxmoe.ops.attention.tpu_walk import Tiles
from jaxmoe.ops.grouped_matmul.mosaic_tpu import RowTiles
from jaxmoe.ops.grouped_matmul.visits import Visits

Grid = tuple[int, ...]
BACKEND = "mosaic_tpu"


@dataclasses.dataclass(frozen=True)
class AheadCase:
  """A kernel at one size.

  Attributes:
    operation: Its package.
    size: Of which model, in a word or two.
    call: Returns a result of arrays that have gradients, and of integers.
    arrays: Shapes of those.
    integers: Shapes of these.
    ideal: FLOPs of the least work, forward and backward.
    steps: How many steps of a grid make products.
    forms: How many forms of a product a kernel has, of which a step takes one.
  """

  operation: str
  size: str
  call: Callable[..., Any]
  arrays: tuple[tuple[int, ...], ...]
  integers: tuple[tuple[int, ...], ...]
  ideal: float
  steps: Callable[[Grid], float]
  forms: int = 1

  def both_ways(self, *args: Any) -> Any:
    """Returns the result and the gradients of all arrays; the last argument is its cotangent."""
    arrays, integers = args[: len(self.arrays)], args[len(self.arrays) : -1]
    out, vjp = jax.vjp(lambda *arrays: self.call(*arrays, *integers), *arrays)
    return out, vjp(args[-1])

  def abstract(self, dtype: str, sharding: Any = None) -> list[jax.ShapeDtypeStruct]:
    """Returns the arguments of `both_ways`."""
    kinds = [(shape, dtype) for shape in self.arrays]
    kinds += [(shape, "int32") for shape in self.integers]
    out = jax.eval_shape(self.call, *(jax.ShapeDtypeStruct(*each) for each in kinds))
    kinds.append((out.shape, out.dtype.name))
    return [jax.ShapeDtypeStruct(*each, sharding=sharding) for each in kinds]

  def work(self, dtype: str) -> float:
    """Returns the FLOPs of products that the kernels make over those of the least work."""
    jaxpr = jax.make_jaxpr(self.both_ways)(*self.abstract(dtype)).jaxpr
    kernels = list(_kernels(jaxpr))
    made = (
      self.steps(eqn.params["grid_mapping"].grid) * _products(eqn.params["jaxpr"])
      for eqn in kernels
    )
    return sum(made) / self.forms / self.ideal


def _inner(eqn: Any) -> list[Any]:
  found = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
  return [getattr(each, "jaxpr", each) for each in found if hasattr(each, "eqns")]


def _kernels(jaxpr: Any) -> Iterator[Any]:
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "pallas_call":
      yield eqn
    else:
      for each in _inner(eqn):
        yield from _kernels(each)


def _products(jaxpr: Any) -> float:
  """Returns the FLOPs of the products in a kernel's text, conditions taken."""
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (over, _), _ = eqn.params["dimension_numbers"]
      depth = math.prod(eqn.invars[0].aval.shape[dim] for dim in over)
      total += 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)
    total += sum(map(_products, _inner(eqn)))
  return total


def _attention(backends: Mapping[str, Backend], name: str) -> AheadCase:
  """Returns a causal row of 4,096 tokens with Mixtral's heads: 32 of 128, 8 of keys."""
  length, heads, size, tiles = 4096, 32, 128, Tiles()

  def call(q: jax.Array, k: jax.Array, v: jax.Array, slot_BL: jax.Array) -> jax.Array:
    sight = Sight(jnp.zeros_like(slot_BL), slot_BL, slot_BL, size**-0.5)
    return backends[BACKEND](q, k, v, sight).out_BLNP

  starts = range(0, length, tiles.queries)
  seen = sum(-(-min(start + tiles.queries, length) // tiles.keys) for start in starts)
  keys = 1, length, 8, size
  pairs = length * (length + 1) / 2
  return AheadCase(
    name, "Mixtral, 4k tokens", call, ((1, length, heads, size), keys, keys), ((1, length),),
    12.0 * pairs * heads * size, lambda grid: float(heads * seen),
  )  # fmt: skip


def _cross_entropy() -> AheadCase:
  """Returns the loss of 4,096 tokens with OLMoE's head."""
  tokens, dim, vocab = 4096, 2048, 50304

  def call(hidden: jax.Array, head: jax.Array, labels_T: jax.Array) -> jax.Array:
    backend = cross_entropy.BACKENDS[BACKEND]
    found: jax.Array = backend(hidden, head, "td,dv->tv", labels_T, tokens)[0]
    return found

  return AheadCase(
    "cross_entropy", "OLMoE, 4k tokens", call, ((tokens, dim), (dim, vocab)), ((tokens,),),
    6.0 * tokens * dim * vocab, lambda grid: float(math.prod(grid)),
  )  # fmt: skip


def _grouped_matmul(name: str, rows: int, slots: int, dim: int, out: int) -> AheadCase:
  """Returns the first product of experts, which random rows choose."""
  sizes_S = np.random.default_rng(0).multinomial(rows, [1 / slots] * slots)
  block = RowTiles.of(rows, slots).rows
  visits = jax.jit(Visits.of, static_argnums=(1, 2))(jnp.asarray(sizes_S, jnp.int32), rows, block)
  # Every slot has rows here: what is past the last visits for nothing.
  assert sizes_S.all()
  busy = int(np.sum(np.asarray(visits.slot_V) < slots))
  return AheadCase(
    "grouped_matmul", name, grouped_matmul.BACKENDS[BACKEND].call,
    ((rows, dim), (slots, dim, out)), ((slots,),), 6.0 * rows * dim * out,
    lambda grid: float(math.prod(grid[:-1]) * busy), forms=2,  # whole blocks, and masked ones
  )  # fmt: skip


def ahead_cases() -> list[AheadCase]:
  """Returns all of them."""
  return [
    _attention(attention.BACKENDS, "attention"),
    _attention(stick_breaking.BACKENDS, "stick_breaking"),
    _cross_entropy(),
    _grouped_matmul("Mixtral, 8k tokens", 16384, 8, 4096, 28672),
    _grouped_matmul("OLMoE, 32k tokens", 262144, 64, 2048, 2048),
  ]
