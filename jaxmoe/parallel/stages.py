"""Stages: which layers each holds, on which device of `pipe`, and where they lie in its memory.

A stacked leaf is cut into equal parts along its layers, one for each device. A device has room for
as many layers of a kind as the one with most of them; what it has no layer for stays empty.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from jaxmoe.core.errors import InputError
from jaxmoe.core.param_names import EMPTY, LayerGroupSizes, PlacedGroup


@dataclasses.dataclass(frozen=True)
class Stages:
  """The layers of each stage, in order of depth, and the device of each stage.

  Attributes:
    counts: How many layers each stage has.
    device_of: On which device of `pipe` it lies.
    spread_vocabulary: Whether embedding and head lie over all devices, and are of no stage.
  """

  counts: tuple[int, ...]
  device_of: tuple[int, ...]
  spread_vocabulary: bool = False

  @property
  def num_devices(self) -> int:
    """Over how many devices the stages lie."""
    return max(self.device_of) + 1

  def bounds(self, stage: int) -> tuple[int, int]:
    """Returns the depth of a stage's first layer, and that after its last one."""
    first = sum(self.counts[:stage])
    return first, first + self.counts[stage]

  def placed(self, sizes: LayerGroupSizes) -> LayerGroupSizes:
    """Returns how layer groups, given in order, lie in memory over the devices."""
    device_of_layer = [
      device for device, count in zip(self.device_of, self.counts) for _ in range(count)
    ]
    groups, first = [], 0
    for width, repeats, *_ in sizes:
      rows = tuple(
        self._rows([device_of_layer[first + r * width + j] for r in range(repeats)])
        for j in range(width)
      )
      groups.append(PlacedGroup(width, repeats, rows))
      first += width * repeats
    return tuple(groups)

  def _rows(self, devices: Sequence[int]) -> tuple[int, ...]:
    """Returns the repeat at each place, of repeats that lie on these devices."""
    room = max(devices.count(device) for device in range(self.num_devices))
    rows: list[int] = []
    for device in range(self.num_devices):
      mine = [repeat for repeat, place in enumerate(devices) if place == device]
      rows += mine + [EMPTY] * (room - len(mine))
    return tuple(rows)


def check_counts(counts: tuple[int, ...], num_layers: int, num_stages: int) -> None:
  """Refuses numbers of layers that are not those of a model's stages.

  Raises:
    InputError: what, why and the cure in one line.
  """
  if len(counts) != num_stages or min(counts) < 1 or sum(counts) != num_layers:
    raise InputError(
      f"stages must give each of {num_stages} stages at least one of {num_layers} layers, and all "
      f"of them: parallel.stages={counts}; give {num_stages} numbers that sum to {num_layers}, or "
      "stages=() to cut by FLOPs"
    )


def cut_by_cost(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
  """Returns how many layers each stage has, such that the costliest stage costs least.

  Args:
    costs: Of each layer, in order; at least `num_stages`.
    num_stages: How many stages there are, each of at least one layer.
  """
  total = [0.0]
  for cost in costs:
    total.append(total[-1] + cost)

  @functools.cache
  def best(end: int, stages: int) -> tuple[float, tuple[int, ...]]:
    if stages == 1:
      return total[end], (end,)
    found = []
    for start in range(stages - 1, end):
      before, counts = best(start, stages - 1)
      found.append((max(before, total[end] - total[start]), (*counts, end - start)))
    return min(found)

  return best(len(costs), num_stages)[1]
