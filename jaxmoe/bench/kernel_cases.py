"""Calls of back ends as the suites make them: one case for each operation of `jaxmoe/ops`.

A case has arrays, what a back end makes of them, and the least work of it. Sizes are those of a
layer of a model: `small8`, whose 1,024 tokens a laptop can race, or a public one.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import ops
from jaxmoe.bench.expert_layers import Shape, choose, swiglu
from jaxmoe.bench.ideal_work import Work, product
from jaxmoe.core.backends import Devices, Need
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.masks import DocumentMask

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """A layer of a model.

  Attributes:
    layer: Its experts, and how many tokens choose among them.
    heads: Of queries.
    key_heads: Of keys and values.
    head_size: Of each.
    rows: Of tokens that attention sees.
    length: Of each.
    vocab_size: Of the loss.
    all_experts: How many tokens the oracle sends through every expert.
    loss_tokens: How many tokens have all their logits at once.
  """

  layer: Shape = Shape()
  heads: int = 8
  key_heads: int = 8
  head_size: int = 64
  rows: int = 4
  length: int = 256
  vocab_size: int = 8192
  all_experts: int = 1024
  loss_tokens: int = 1024

  @classmethod
  def public(cls, layer: Shape, heads: int, key_heads: int, vocab_size: int) -> Sizes:
    """Returns those of a public model: a row of 4,096 tokens, heads of 128."""
    return cls(layer, heads, key_heads, 128, 1, 4096, vocab_size, 2048, 4096)


SIZES = {
  "small8": Sizes(),
  "olmoe": Sizes.public(Shape(32768, 2048, 1024, 64, 8), 16, 16, 50304),
  "mixtral": Sizes.public(Shape(8192, 4096, 14336, 8, 2), 32, 8, 32000),
  "qwen3": Sizes.public(Shape(32768, 2048, 768, 128, 8), 32, 4, 151936),
}
"""By name; OLMoE-1B-7B, Mixtral 8x7B and Qwen3-30B-A3B as their configs have them."""


@dataclasses.dataclass(frozen=True)
class Case:
  """An operation at one size.

  Attributes:
    args: Arrays, of which there are gradients.
    call: Returns, of a back end, the function of `args`.
    sizes: By letter, as a need has them.
    work: The least of it, forward and backward.
    base: The back end that is the oracle.
    constants: What a rival is told beside `args`, by name; None where no rival has the operation.
  """

  args: tuple[jax.Array, ...]
  call: Callable[[Any], Function]
  sizes: Mapping[str, int]
  work: Work
  base: str = "reference"
  constants: Mapping[str, jax.Array] | None = None

  def cast(self, dtype: str) -> Case:
    """Returns the same of arrays of another type."""
    return dataclasses.replace(self, args=tuple(arg.astype(dtype) for arg in self.args))


def both_ways(function: Function) -> Function:
  """Returns what gives the output and the gradients of all arguments; the last is the cotangent."""

  def run(*args: jax.Array) -> Any:
    out, vjp = jax.vjp(function, *args[:-1])
    return out, vjp(args[-1])

  return run


def fitting(backend: Any, sizes: Mapping[str, int], dtype: str = "float32") -> str | None:
  """Returns why a back end does not fit a need of these devices; None if it does."""
  fits = getattr(backend, "fits", None)
  return fits(Need(Devices.here(), dtype, sizes)) if fits else None


def operations() -> dict[str, Mapping[str, Any]]:
  """Returns the back ends of each package of `jaxmoe/ops` that has some."""
  found = {}
  for module in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
    backends = getattr(importlib.import_module(module.name), "BACKENDS", None)
    if backends:
      found[module.name.rpartition(".")[2]] = backends
  return found


def attention_call(backend: Any, segment_BL: jax.Array) -> Function:
  """Returns causal attention within documents by a back end."""
  slot_BL = jnp.broadcast_to(jnp.arange(segment_BL.shape[1], dtype=jnp.int32), segment_BL.shape)
  tokens = Tokens(slot_BL, slot_BL, segment_BL, slot_BL)

  def call(q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array) -> jax.Array:
    sight = DocumentMask()(tokens, tokens)
    sight = dataclasses.replace(sight, scale=q_BLNH.shape[-1] ** -0.5)
    return backend(q_BLNH, k_BLNH, v_BLNH, sight).out_BLNP

  return call


def attention(of: Sizes) -> Case:
  """Returns causal attention."""
  batch, length, heads, groups, size = of.rows, of.length, of.heads, of.key_heads, of.head_size
  keys = jax.random.split(jax.random.key(0), 3)
  pairs = batch * length * (length + 1) / 2
  # Queries, results and their gradients are read or written 5 times, keys and values 6 in all.
  moved = 4.0 * batch * length * size * (5 * heads + 6 * groups)
  return Case(
    tuple(
      jax.random.normal(key, (batch, length, number, size))
      for key, number in zip(keys, (heads, groups, groups))
    ),
    lambda backend: attention_call(backend, jnp.ones((batch, length), jnp.int32)),
    {"B": batch, "L": length, "S": length, "N": heads, "K": groups, "H": size, "P": size},
    Work(12.0 * pairs * heads * size, moved),
    constants={},
  )


def stick_breaking(of: Sizes) -> Case:
  """Returns the same with the stick broken, which no rival has."""
  return dataclasses.replace(attention(of), constants=None)


def cross_entropy(of: Sizes) -> Case:
  """Returns the loss of each token from hidden states and the head."""
  tokens, dim, vocab_size = of.loss_tokens, of.layer.dim, of.vocab_size
  hidden_TD, head_1DV = _arrays((tokens, dim), (1, dim, vocab_size))
  labels_T = jnp.arange(tokens) * 7 % vocab_size

  def call(backend: Any) -> Function:
    return lambda hidden, head: backend(hidden, head, "td,dv->tv", labels_T, tokens, None)[0]

  sizes = {"T": tokens, "D": dim, "C": tokens}
  work = product(tokens, dim, vocab_size).times(3)
  return Case((hidden_TD, head_1DV[0]), call, sizes, work, constants={"labels": labels_T})


def grouped_matmul(of: Sizes) -> Case:
  """Returns rows sorted by expert times their experts' matrices."""
  layer = of.layer
  rows = layer.tokens * layer.num_active
  sizes_E = np.bincount(choose(layer).ravel(), minlength=layer.num_experts)
  counts = jnp.asarray(sizes_E, jnp.int32)
  shapes = (rows, layer.dim), (layer.num_experts, layer.dim, layer.mlp_dim)
  return Case(
    _arrays(*shapes),
    lambda backend: lambda rows_RD, weight_EDF: backend(rows_RD, weight_EDF, counts),
    {"R": rows, "S": layer.num_experts, "D": layer.dim, "F": layer.mlp_dim},
    product(rows, layer.dim, layer.mlp_dim, layer.num_experts).times(3),
    base="loop",
    constants={"counts": counts},
  )


def expert_mlp(of: Sizes) -> Case:
  """Returns a whole SwiGLU expert layer."""
  layer = dataclasses.replace(of.layer, tokens=of.all_experts)
  slot_TA = jnp.asarray(choose(layer))
  tokens, dim, hidden, experts = layer.tokens, layer.dim, layer.mlp_dim, layer.num_experts
  rows = tokens * layer.num_active
  work = product(rows, dim, 2 * hidden, experts) + product(rows, hidden, dim, experts)
  x_TD, up, down, weight_TA = _arrays(
    (tokens, dim), (experts, dim, 2, hidden), (experts, hidden, dim), (tokens, layer.num_active)
  )

  def call(backend: Any) -> Function:
    return lambda x, up, down, weight: backend(x, up, down, slot_TA, weight, swiglu)

  letters = {"T": tokens, "A": layer.num_active, "S": experts, "D": dim, "G": 2, "F": hidden}
  return Case((x_TD, up, down, jax.nn.softmax(weight_TA)), call, letters, work.times(3))


def top_k(of: Sizes) -> Case:
  """Returns the choice of 8 of 64 or more experts, seen through the ranks of the chosen."""
  tokens, experts, num = of.layer.tokens, max(64, of.layer.num_experts), 8
  (rank_TE,) = _arrays((tokens, experts))

  def call(backend: Any) -> Function:
    return lambda rank_TE: jnp.take_along_axis(rank_TE, backend(rank_TE, num), axis=1)

  sizes = {"T": tokens, "E": experts, "A": num}
  return Case((rank_TE,), call, sizes, Work(0, 8.0 * tokens * (experts + num)))


def move(of: Sizes) -> Case:
  """Returns the rows that experts read, of tokens in the order of their experts."""
  tokens, dim = of.layer.tokens, of.layer.dim
  token_R = jnp.asarray(_order(of.layer) // of.layer.num_active)
  (values_TD,) = _arrays((tokens, dim))
  work = Work(0, 8.0 * dim * (tokens + token_R.size))  # there, and back with the gradient
  sizes = {"T": tokens, "R": token_R.size, "D": dim}
  return Case((values_TD,), lambda backend: lambda values: backend(values, token_R), sizes, work)


def combine(of: Sizes) -> Case:
  """Returns what experts made of rows, weighted and summed for each token."""
  tokens, active, dim = of.layer.tokens, of.layer.num_active, of.layer.dim
  rows = tokens * active
  row_TA = jnp.asarray(np.argsort(_order(of.layer)).reshape(tokens, active))
  rows_RD, weight_TA = _arrays((rows, dim), (tokens, active))

  def call(backend: Any) -> Function:
    return lambda rows_RD, weight_TA: backend(rows_RD, row_TA, weight_TA)

  # Rows there, with the gradient of weights, and their own gradient; the sum and its gradient.
  work = Work(0, 4.0 * dim * (3 * rows + 2 * tokens))
  sizes = {"T": tokens, "A": active, "R": rows, "D": dim}
  return Case((rows_RD, jax.nn.softmax(weight_TA)), call, sizes, work)


CASES: dict[str, Callable[[Sizes], Case]] = {
  "attention": attention,
  "combine": combine,
  "cross_entropy": cross_entropy,
  "expert_mlp": expert_mlp,
  "grouped_matmul": grouped_matmul,
  "move": move,
  "stick_breaking": stick_breaking,
  "top_k": top_k,
}


def _order(layer: Shape) -> np.ndarray:
  """Returns each choice of each token, counted token after token, in the order of experts."""
  return np.argsort(choose(layer).ravel(), kind="stable").astype(np.int32)


def _arrays(*shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
  """Returns random arrays that keep the size of what they multiply."""
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return tuple(
    jax.random.normal(key, shape) / (shape[1] ** 0.5 if len(shape) > 2 else 1)
    for key, shape in zip(keys, shapes)
  )
