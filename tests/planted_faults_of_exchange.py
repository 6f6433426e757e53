"""Faults planted in exchanges of rows between experts; see `tests/planted_faults.py`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.moe.dispatch import exchange, row_exchange
from jaxmoe.parallel import Parallel
from jaxmoe.parity import Cell

EXPERT = Cell(Parallel(expert=2))
GATHERED = dataclasses.replace(EXPERT, exchange="all_gather")
CHUNKED = dataclasses.replace(EXPERT, exchange="all_to_all_chunked")
FOLD_DATA = Cell(Parallel(data=2, expert=2, fold=("data",)), exchange="all_to_all_two_level")


def own_part(x: jax.Array, axis: Any, *, scatter_dimension: int, tiled: bool) -> jax.Array:
  """Returns what `psum_scatter` would if others had zeros."""
  del tiled
  size = x.shape[scatter_dimension] // jax.lax.axis_size(axis)
  first = jax.lax.axis_index(axis) * size
  return jax.lax.dynamic_slice_in_dim(x, first, size, axis=scatter_dimension)


def far_before_near(original: Any) -> Any:
  """The two levels of an exchange over each other's axes."""

  def all_to_all(self, parts_eF: jax.Array, two_level: bool = False) -> jax.Array:
    turned = dataclasses.replace(self, axes=self.axes[::-1], degrees=self.degrees[::-1])
    return original(turned if two_level else self, parts_eF, two_level)

  return all_to_all


def sizes_not_swapped(original: Any) -> Any:
  """Devices that take their own numbers of rows for those of others."""

  def all_to_all(self, parts_eF: jax.Array, two_level: bool = False) -> jax.Array:
    whole = jnp.issubdtype(parts_eF.dtype, jnp.integer)
    return parts_eF if whole else original(self, parts_eF, two_level)

  return all_to_all


def on_return(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """Returns an exchange whose every second move of rows, the way back, is another."""

  def make(original: Any) -> Any:
    moves: list[None] = []

    def all_to_all(self, parts_eF: jax.Array, two_level: bool = False) -> jax.Array:
      swapped = original(self, parts_eF, two_level)
      if jnp.issubdtype(parts_eF.dtype, jnp.integer):
        return swapped
      moves.append(None)
      return swapped if len(moves) % 2 else change(swapped)

    return all_to_all

  return make


def spans_backwards(original: Any) -> Any:
  """Pieces of an exchange that are put together in the wrong order."""
  return lambda *args: original(*args)[::-1]


def own_rows(original: Any) -> Any:
  """A device's own part of what its experts made, without that of other devices' experts."""

  def scatter(self, y_TF: jax.Array) -> jax.Array:
    return own_part(y_TF, self.axes, scatter_dimension=0, tiled=True)

  return scatter


def weights_detached(original: Any) -> Any:
  """Weights of choices that are gathered without a gradient."""

  def gather(self, x_tF: jax.Array) -> jax.Array:
    is_weight = x_tF.shape[1] == 2 and x_tF.dtype == jnp.float32
    return original(self, jax.lax.stop_gradient(x_tF) if is_weight else x_tF)

  return gather


FAULTS_OF_EXCHANGE = {
  "levels of an exchange are swapped": (
    FOLD_DATA, exchange.DeviceGroup, "all_to_all", far_before_near
  ),
  "sizes of groups stay where they are": (
    EXPERT, exchange.DeviceGroup, "all_to_all", sizes_not_swapped
  ),
  "rows return to the wrong device": (
    EXPERT, exchange.DeviceGroup, "all_to_all",
    on_return(lambda parts_eF: jnp.roll(parts_eF, 1, axis=0)),
  ),
  "a combine is dropped": (
    EXPERT, exchange.DeviceGroup, "all_to_all", on_return(jnp.zeros_like)
  ),
  "pieces are put together backwards": (CHUNKED, row_exchange, "spans", spans_backwards),
  "outputs of experts elsewhere are left out": (
    GATHERED, exchange.DeviceGroup, "scatter", own_rows
  ),
  "the router is detached by an all-gather": (
    GATHERED, exchange.DeviceGroup, "gather", weights_detached
  ),
}  # fmt: skip
"""By name: the cell, and where what stands in the place of what."""
