"""Adafactor: second moments kept as rows and columns (arXiv:1804.04235, algorithms 4 and 5).

Factoring, clipping by rms and scaling by the parameter's rms all look at a leaf as a whole. Here
the whole is one layer's leaf, and one expert of it: optax's transforms are mapped over those dims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmoe.ops.guard import guarded
from jaxmoe.optim.matrices import map_dims, stack_depth
from jaxmoe.optim.optimizers.checks import check_decay, check_positive


@dataclasses.dataclass(frozen=True)
class Adafactor:
  """The paper's constants, without momentum; with decay times learning rate, as in AdamW.

  With `scale_by_parameter` the learning rate is relative to a block's rms (at least 1e-3), so it
  is larger than AdamW's: 1e-2 is the paper's. Blocks whose second largest dim is below
  `min_dim_size_to_factor` keep the full second moment.
  """

  decay_exponent: float = 0.8
  clip_rms: float = 1.0
  scale_by_parameter: bool = True
  min_dim_size_to_factor: int = 128
  eps: float = 1e-30
  weight_decay: float = 0.0

  def __post_init__(self) -> None:
    check_positive(
      decay_exponent=self.decay_exponent,
      clip_rms=self.clip_rms,
      min_dim_size_to_factor=self.min_dim_size_to_factor,
      eps=self.eps,
    )
    check_decay(self.weight_decay)

  def direction(self, names: Any, dims: Any) -> optax.GradientTransformationExtraArgs:
    """Returns optax's Adafactor without its learning rate, block by block."""
    factored = optax.scale_by_factored_rms(
      decay_rate=self.decay_exponent,
      min_dim_size_to_factor=self.min_dim_size_to_factor,
      epsilon=self.eps,
    )
    scales = [optax.clip_by_block_rms(self.clip_rms)]
    if self.scale_by_parameter:
      scales.append(optax.scale_by_param_block_rms())
    return guarded(_by_block(factored, optax.chain(*scales), map_dims(stack_depth, dims)))


def _by_block(
  factored: optax.GradientTransformation, scale: optax.GradientTransformation, depths: Any
) -> optax.GradientTransformation:
  """Returns `factored`, then the stateless `scale`, mapped over the leading dims of each leaf.

  The state is an `optax.FactoredState`, as optax's own: one count, and three trees like the
  parameters, in which the leading dims of a leaf stay.
  """

  def init(params: Any) -> optax.FactoredState:
    def init_leaf(depth: int, param: jax.Array) -> tuple[jax.Array, ...]:
      return _over(depth, lambda block: tuple(factored.init(block)[1:]))(param)

    rows, columns, full = _unzip(jax.tree.map(init_leaf, depths, params), depths, 3)
    return optax.FactoredState(jnp.zeros([], jnp.int32), rows, columns, full)

  def update(updates: Any, state: optax.FactoredState, params: Any = None) -> tuple[Any, Any]:
    def update_block(*block: jax.Array) -> tuple[jax.Array, ...]:
      gradient, row, column, full, param = block
      before = optax.FactoredState(state.count, row, column, full)
      direction, after = factored.update(gradient, before, param)
      direction, _ = scale.update(direction, scale.init(param), param)
      return (direction, *after[1:])

    def update_leaf(depth: int, *leaf: jax.Array) -> tuple[jax.Array, ...]:
      return _over(depth, update_block)(*leaf)

    results = jax.tree.map(update_leaf, depths, updates, *state[1:], params)
    directions, *moments = _unzip(results, depths, 4)
    return directions, optax.FactoredState(optax.safe_increment(state.count), *moments)

  return optax.GradientTransformation(init, update)


def _over(depth: int, function: Callable) -> Callable:
  for _ in range(depth):
    function = jax.vmap(function)
  return function


def _unzip(tree: Any, like: Any, width: int) -> list[Any]:
  """Returns the `width` trees like `like` out of one whose leaves are tuples."""
  return [jax.tree.map(lambda _, leaf, i=i: leaf[i], like, tree) for i in range(width)]
