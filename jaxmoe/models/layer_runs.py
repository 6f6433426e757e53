"""Layers a..b of a stack: the leaves they are in memory, cut out and put back together.

Layers are grouped in memory for `scan`, so a range of them is a few runs: whole repeats of a
pattern, and at its ends a part of one repeat. A run that is a whole layer group is not cut. Where
groups have an order of their own in memory, a run ends where that order jumps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.param_names import EMPTY, LayerAddress, LayerGroupSizes, PlacedGroup


@dataclasses.dataclass(frozen=True)
class LayerRun:
  """Layers of one group that run one after the other.

  Attributes:
    group: The layer group, as parameters name it.
    positions: Those of its pattern; all of them if it has more than one repeat.
    start: The first repeat.
    stop: The repeat after the last one.
    depth: Of the layer at position 0 of the first repeat; may be traced.
    whole: Whether it is all of the group.
    rows: The place in memory of the first repeat of each position, where it is not `start`.
  """

  group: str
  positions: tuple[str, ...]
  start: int
  stop: int
  depth: Any
  whole: bool
  rows: tuple[int, ...] = ()

  def take(self, stack: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the run's part of what is stacked over repeats, by position."""

    def part(place: str, of: Any) -> Any:
      at = self.row(place)
      return jax.tree.map(lambda leaf: leaf[at : at + self.stop - self.start], of)

    return {
      place: of if self.whole else part(place, of)
      for place, of in stack[self.group].items()
      if LayerAddress.parse(self.group, place).position in self.positions
    }

  def row(self, place: str) -> int:
    """Returns where in memory a position's first repeat lies."""
    position = LayerAddress.parse(self.group, place).position
    return self.rows[self.positions.index(position)] if self.rows else self.start

  def repeat(self, number: int) -> LayerRun:
    """Returns one repeat of it, from 0."""
    start = self.start + number
    return dataclasses.replace(
      self, start=start, stop=start + 1, depth=self.depth + number * len(self.positions),
      whole=self.whole and self.stop == 1, rows=tuple(row + number for row in self.rows),
    )  # fmt: skip


def layer_runs(sizes: LayerGroupSizes, start: int = 0, stop: int | None = None) -> list[LayerRun]:
  """Returns the runs of layers start..stop-1, in order; of all layers, the layer groups."""
  runs, first = [], 0
  for s, (width, repeats, *_) in enumerate(sizes):
    end = width * repeats if stop is None else min(stop - first, width * repeats)
    at = max(start - first, 0)
    while at < end:
      repeat, position = divmod(at, width)
      whole_repeats = 0 if position else (end - at) // width
      until = at + (whole_repeats * width or min(width - position, end - at))
      positions = tuple(str(j) for j in range(position, position + min(width, until - at)))
      last = repeat + max(whole_repeats, 1)
      is_all = whole_repeats == repeats
      run = LayerRun(str(s), positions, repeat, last, first + repeat * width, is_all)
      runs.extend(_in_memory(run, sizes[s]))
      at = until
    first += width * repeats
  return runs


def _in_memory(run: LayerRun, size: tuple[int, int] | PlacedGroup) -> list[LayerRun]:
  """Returns a run cut where its repeats do not follow each other in memory."""
  if not isinstance(size, PlacedGroup):
    return [run]
  rows = [
    tuple(size.rows[int(j)].index(repeat) for j in run.positions)
    for repeat in range(run.start, run.stop)
  ]
  cuts = [0]
  for number in range(1, len(rows)):
    if any(here != before + 1 for before, here in zip(rows[number - 1], rows[number])):
      cuts.append(number)
  return [
    dataclasses.replace(
      run, start=run.start + a, stop=run.start + b, depth=run.depth + a * len(run.positions),
      whole=False, rows=rows[a],
    )
    for a, b in zip(cuts, [*cuts[1:], len(rows)])
  ]  # fmt: skip


def repeats_apart(sizes: LayerGroupSizes) -> list[LayerRun]:
  """Returns a run for each repeat of each pattern, in order, of leaves stacked over one."""
  return [
    run.repeat(number) for run in layer_runs(sizes) for number in range(run.stop - run.start)
  ]


def in_memory_order(layers: Mapping[str, Any], sizes: LayerGroupSizes) -> dict[str, Any]:
  """Returns what is stacked in order of repeats, by group and place, as it lies in memory.

  Empty places are zeros.
  """

  def placed(s: str, place: str, of: Any) -> Any:
    size = sizes[int(s)]
    if not isinstance(size, PlacedGroup):
      return of
    rows = np.array(size.rows[int(LayerAddress.parse(s, place).position)])

    def leaf_of(leaf: jax.Array) -> jax.Array:
      filled = (rows != EMPTY).reshape(-1, *[1] * (leaf.ndim - 1))
      return jnp.where(filled, leaf[np.maximum(rows, 0)], jnp.zeros((), leaf.dtype))

    return jax.tree.map(leaf_of, of)

  return {
    s: {place: placed(s, place, of) for place, of in places.items()}
    for s, places in layers.items()
  }


def keep_empty(depths: Sequence[int], new: Any, before: Any) -> Any:
  """Returns leaves stacked over places of these depths, empty ones as they were before."""
  if EMPTY not in depths:
    return new
  filled = np.array(depths) != EMPTY

  def leaf_of(new: jax.Array, before: jax.Array) -> jax.Array:
    return jnp.where(filled.reshape(-1, *[1] * (new.ndim - 1)), new, before)

  return jax.tree.map(leaf_of, new, before)


def join_runs(runs: Sequence[LayerRun], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns what runs have, by position, by group and position: the inverse of `LayerRun.take`.

  The runs are those of all layers, in order, and what they have is stacked over their repeats.
  """
  parts: dict[str, dict[str, list[Any]]] = {}
  for run, places in zip(runs, found, strict=True):
    for place, of in places.items():
      parts.setdefault(run.group, {}).setdefault(place, []).append(of)
  return {
    group: {place: _joined(several) for place, several in places.items()}
    for group, places in parts.items()
  }


def _joined(several: list[Any]) -> Any:
  if len(several) == 1:
    return several[0]
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *several)
