"""Layers a..b of a stack: the leaves they are in memory, cut out and put back together.

Layers are grouped in memory for `scan`, so a range of them is a few runs: whole repeats of a
pattern, and at its ends a part of one repeat. A run that is a whole layer group is not cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.param_names import LayerAddress, LayerGroupSizes


@dataclasses.dataclass(frozen=True)
class LayerRun:
  """Layers of one group that run one after the other.

  Attributes:
    group: The layer group, as parameters name it.
    positions: Those of its pattern; all of them if it has more than one repeat.
    start: The first repeat.
    stop: The repeat after the last one.
    depth: Of the layer at position 0 of the first repeat.
    whole: Whether it is all of the group.
  """

  group: str
  positions: tuple[str, ...]
  start: int
  stop: int
  depth: int
  whole: bool

  def take(self, stack: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the run's part of what is stacked over repeats, by position."""
    group = stack[self.group]
    return {
      place: of if self.whole else jax.tree.map(lambda leaf: leaf[self.start : self.stop], of)
      for place, of in group.items()
      if LayerAddress.parse(self.group, place).position in self.positions
    }


def layer_runs(sizes: LayerGroupSizes, start: int = 0, stop: int | None = None) -> list[LayerRun]:
  """Returns the runs of layers start..stop-1, in order; of all layers, the layer groups."""
  runs, first = [], 0
  for s, (width, repeats) in enumerate(sizes):
    end = width * repeats if stop is None else min(stop - first, width * repeats)
    at = max(start - first, 0)
    while at < end:
      repeat, position = divmod(at, width)
      whole_repeats = 0 if position else (end - at) // width
      until = at + (whole_repeats * width or min(width - position, end - at))
      positions = tuple(str(j) for j in range(position, position + min(width, until - at)))
      last = repeat + max(whole_repeats, 1)
      is_all = whole_repeats == repeats
      runs.append(LayerRun(str(s), positions, repeat, last, first + repeat * width, is_all))
      at = until
    first += width * repeats
  return runs


def repeats_apart(sizes: LayerGroupSizes) -> list[LayerRun]:
  """Returns a run for each repeat of each pattern, in order, of leaves stacked over one."""
  return [
    dataclasses.replace(
      run, start=repeat, stop=repeat + 1, whole=run.stop == 1,
      depth=run.depth + repeat * len(run.positions),
    )
    for run in layer_runs(sizes)
    for repeat in range(run.stop)
  ]  # fmt: skip


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
