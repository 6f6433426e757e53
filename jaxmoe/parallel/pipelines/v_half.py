"""V-Half (Qi et al. 2024, arXiv:2405.15362, section 4): half of 1F1B's activations, small bubble.

A microbatch's passes are a building block, repeated every six units (six passes a device, F = B =
W): first stages are 2 units apart from device to device on the way out, 1 on the way back, and so
are their gradients. How long the block lives on a device is what is in flight there.
"""

from __future__ import annotations

from jaxmoe.parallel.pipelines.action import Action
from jaxmoe.parallel.pipelines.dependencies import Pass
from jaxmoe.parallel.pipelines.order_list import require_micro
from jaxmoe.parallel.pipelines.stage_placement import v_shape
from jaxmoe.parallel.pipelines.table import Table

INTERVAL = 6
"""Units from a microbatch to the next in steady state: F, B and W of two stages."""


def v_half(num_devices: int, num_micro: int) -> Table:
  """Returns the building block repeated and squeezed; in flight are (p + 2) // 2 microbatches.

  Forward and backward passes keep the order of the repeated block. Each starts as soon as it can; a
  `W` is done where a device would wait, or has to make room.
  """
  require_micro("v_half", num_devices, num_micro)
  waiting = [_in_order(device, num_devices, num_micro) for device in range(num_devices)]
  orders: list[list[Action]] = [[] for _ in range(num_devices)]
  weights: list[list[Action]] = [[] for _ in range(num_devices)]
  done: set[Pass] = set()
  while any(waiting) or any(weights):
    row = [
      _next_pass(waiting[device], weights[device], orders[device], done, num_devices)
      for device in range(num_devices)
    ]
    for device, action in enumerate(row):
      if action is not None:
        orders[device].append(action)
        done.add((action.stage, action.kind, action.micro))
        if action.kind == "B":
          weights[device].append(Action(action.stage, "W", action.micro))
  return Table(v_shape(num_devices), num_micro, tuple(map(tuple, orders)))


def _in_order(device: int, num_devices: int, num_micro: int) -> list[Action]:
  """Returns forward and backward passes of a device by the time that the repeated block gives."""
  first, second = device, 2 * num_devices - 1 - device
  # An even number of devices would have two passes at one time; the gradients start 3 units later.
  gap = 3 if num_devices % 2 == 0 else 0
  starts = {
    (first, "F"): 2 * device,
    (second, "F"): 3 * num_devices - device - 2,
    (second, "B"): 3 * num_devices + gap + 2 * device - 1,
    (first, "B"): 6 * num_devices + gap - device - 2,
  }
  timed = [
    (start + INTERVAL * micro, Action(stage, kind, micro))
    for (stage, kind), start in starts.items()
    for micro in range(num_micro)
  ]
  return [action for _, action in sorted(timed, key=lambda each: each[0])]


def _next_pass(
  waiting: list[Action], weights: list[Action], order: list[Action], done: set[Pass], size: int
) -> Action | None:
  """Takes what a device does in this unit: its next pass, or a `W` where that cannot start."""
  if waiting and _may_start(waiting[0], done, size):
    held = sum({"F": 1, "W": -1}.get(action.kind, 0) for action in order)
    if waiting[0].kind == "B" or held < 2 * ((size + 2) // 2):
      return waiting.pop(0)
  return weights.pop(0) if weights else None


def _may_start(action: Action, done: set[Pass], size: int) -> bool:
  """Returns whether a pass has what it needs."""
  stage, kind, micro = action.stage, action.kind, action.micro
  if kind == "F":
    return stage == 0 or (stage - 1, "F", micro) in done
  return ((stage + 1, "B", micro) if stage < 2 * size - 1 else (stage, "F", micro)) in done
