"""Faults planted in kernels, each of which the loop in float64 must find, run by an interpreter."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxmoe.ops.attention import tpu_walk
from jaxmoe.ops.grouped_matmul.visits import SlotVisit, Visits

# The packages have functions of the names of these modules.
SOFTMAX, STICKS, LOSS = "attention", "stick_breaking", "cross_entropy"
GROUPED = "grouped_matmul"
attention, sticks, losses = (
  importlib.import_module(f"jaxmoe.ops.{operation}.mosaic_tpu")
  for operation in (SOFTMAX, STICKS, LOSS)
)


@dataclasses.dataclass(frozen=True)
class KernelFault:
  """A wrong function in the place of a right one.

  Attributes:
    operation: Whose kernel it is in.
    owner: The module it is planted in.
    name: Of what it replaces there.
    planted: Returns the wrong one, of the right one.
  """

  operation: str
  owner: Any
  name: str
  planted: Callable[[Any], Any]


def _changed(of: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
  return functools.wraps(of)(lambda *args, **keywords: change(of(*args, **keywords)))


def _block_too_few(right: Any) -> Any:
  return _changed(right, lambda found: (found[0], jnp.maximum(found[1] - 1, 0)))


def _one_on(right: Any) -> Any:
  return lambda t, low, high: right(t + 1, low, high)


def _no_end(right: Any) -> Any:
  return lambda first, last, slot: first[...] <= slot[...]


def _first_head(right: Any) -> Any:
  return classmethod(lambda cls, tiles, group, blocks: right(tiles, 1, blocks))


def _own_too(right: Any) -> Any:
  return lambda size: right(size) + jnp.eye(size, dtype=jnp.float32)


def _without_scale(right: Any) -> Any:
  return lambda *args: right(*args[:-1], 1.0)


def _sums_of_a_block(right: Any) -> Any:
  return lambda k, q, mask, left, scale: right(k, q, mask, jnp.zeros_like(left), scale)


def _no_share_of_the_sum(right: Any) -> Any:
  def pulled(k: Any, q: Any, v: Any, dout: Any, lse: Any, pull: Any, *rest: Any) -> Any:
    return right(k, q, v, dout, lse, jnp.zeros_like(pull[...]), *rest)

  return pulled


def _nothing_is_left(right: Any) -> Any:
  def backward(scale: Any, tiles: Any, saved: Any, cotangents: Any) -> Any:
    return right(scale, tiles, saved, (cotangents[0], jnp.zeros_like(cotangents[1])))

  return backward


def _all_there(right: Any) -> Any:
  return lambda grid, columns, *refs: right(grid, [jnp.int32(2**30)], *refs)


def _sum_of_the_last(right: Any) -> Any:
  def add(sum_ref: Any, out: Any, one: Any) -> None:
    sum_ref[...] = jnp.zeros_like(sum_ref)
    right(sum_ref, out, one)

  return add


def _row_before(right: Any) -> Any:
  return lambda self, lanes=False: right(self, lanes) + 1


def _one_more(right: Any) -> Any:
  return property(lambda self: (right.fget(self)[0], right.fget(self)[1] + 1))


def _any_end(right: Any) -> Any:
  del right
  return property(lambda self: (self.range[0] <= 0) & (self.range[1] > 0))


def _of_other_sizes(right: Any) -> Any:
  return classmethod(lambda cls, sizes, *rest: right(jnp.roll(sizes, 1), *rest))


FAULTS = {
  "a walk ends a block early": KernelFault(SOFTMAX, tpu_walk, "_range", _block_too_few),
  "a walk begins a block late": KernelFault(SOFTMAX, attention, "upward", _one_on),
  "no mask after a query's last key": KernelFault(SOFTMAX, attention, "mask", _no_end),
  "keys have the gradient of one head": KernelFault(
    SOFTMAX, attention.Steps, "over_queries", _first_head
  ),
  "shares pull without the others": KernelFault(
    SOFTMAX, attention, "_pulled", _no_share_of_the_sum
  ),
  "scores of the way back are not scaled": KernelFault(
    SOFTMAX, attention, "_pulled", _without_scale
  ),
  "a key takes of what it left itself": KernelFault(STICKS, sticks, "_earlier", _own_too),
  "a block breaks a whole stick": KernelFault(STICKS, sticks, "_shares", _sums_of_a_block),
  "columns past the vocabulary count": KernelFault(LOSS, losses, "_forward_kernel", _all_there),
  "a sum forgets the tiles before": KernelFault(LOSS, losses, "_add", _sum_of_the_last),
  "columns are one off": KernelFault(LOSS, losses._Grid, "column", _row_before),
  "a slot ends a row late": KernelFault(GROUPED, SlotVisit, "range", _one_more),
  "a slot's last block is not masked": KernelFault(GROUPED, SlotVisit, "whole", _any_end),
  "slots visit by sizes of before": KernelFault(GROUPED, Visits, "of", _of_other_sizes),
  "a walk down stops above the last": KernelFault(STICKS, sticks, "downward", _one_on),
}
"""By what is wrong."""
