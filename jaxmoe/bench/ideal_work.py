"""The least work of a program: what its products need, by arithmetic from the recipe alone.

Each product reads its two factors once and writes its result once; nothing between products is
counted, and no product is made again. A program may beat the bytes by keeping a result where the
next product finds it. For models of `model_shapes`: softmax attention and SwiGLU experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmoe.train.experiment import Experiment

_BYTES = 4  # float32


@dataclasses.dataclass(frozen=True)
class Work:
  """Floating point operations and bytes."""

  flops: float = 0.0
  bytes: float = 0.0

  def __add__(self, other: Work) -> Work:
    """Returns both."""
    return Work(self.flops + other.flops, self.bytes + other.bytes)

  def times(self, number: float) -> Work:
    """Returns it so many times."""
    return Work(number * self.flops, number * self.bytes)


def product(rows: float, inner: float, out: float, weights: float = 1) -> Work:
  """Returns the work of (rows, inner) x (inner, out), spread over so many matrices."""
  moved = rows * inner + weights * inner * out + rows * out
  return Work(2.0 * rows * inner * out, _BYTES * moved)


def step_work(experiment: Experiment) -> Work:
  """Returns the work of a training step: each product three times, and one pass of the optimizer.

  The optimizer reads parameter, gradient and two moments, and writes all but the gradient.
  """
  model, data = experiment.model, experiment.data
  tokens, length = experiment.train.batch_size * data.seq_len, data.seq_len
  decoder = experiment.decoder()
  attention = _attention(model)
  heads = attention.num_heads * attention.head_dim
  keys = attention.num_kv_heads * attention.head_dim
  # Forward q, k, v and the output; backward these, the gradient of the last, and three more.
  mixing = Work(
    attention.mixing_flops(length) * tokens, _BYTES * tokens * (5 * heads + 7 * keys)
  )
  layers = (_projections(model, tokens).times(3) + mixing).times(model.num_layers)
  head = product(tokens, model.dim, decoder.vocab_size).times(3)
  embedding = Work(0, _BYTES * 2 * tokens * model.dim)
  optimizer = Work(0, _BYTES * 7 * decoder.num_params)
  return layers + head + embedding + optimizer


def decode_work(experiment: Experiment, rows: int, new: int, slots: int) -> Work:
  """Returns the work of `new` tokens in each of some rows, of which the last gets logits.

  Queries see `slots` keys each, which are read once; the cache gets the new ones.
  """
  model, vocab_size = experiment.model, experiment.decoder().vocab_size
  attention = _attention(model)
  heads = attention.num_heads * attention.head_dim
  keys = attention.num_kv_heads * attention.head_dim
  tokens = rows * new
  seen = slots - (new - 1) / 2  # on average: earlier ones of the new tokens see less
  mixing = Work(
    4.0 * tokens * heads * seen, _BYTES * (2 * rows * slots * keys + 2 * tokens * (heads + keys))
  )
  layers = (_projections(model, tokens) + mixing).times(model.num_layers)
  return layers + product(rows, model.dim, vocab_size) + Work(0, _BYTES * tokens * model.dim)


def _projections(model: Any, tokens: int) -> Work:
  """Returns the work of the products of one layer, forward."""
  attention, moe, dim = _attention(model), model.moe_records()[0], model.dim
  heads = attention.num_heads * attention.head_dim
  keys = attention.num_kv_heads * attention.head_dim
  rows, hidden = tokens * moe.num_active, moe.experts.mlp_dim
  used = min(moe.num_experts, rows)
  return (
    product(tokens, dim, heads + 2 * keys)
    + product(tokens, heads, dim)
    + product(tokens, dim, moe.num_experts)
    + product(rows, dim, 2 * hidden, used)
    + product(rows, hidden, dim, used)
  )


def _attention(model: Any) -> Any:
  (group,) = model.stack
  (block,) = group.pattern
  return block.attention
