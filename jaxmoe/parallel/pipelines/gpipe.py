"""GPipe (Huang et al. 2019): all forward passes, then all backward passes."""

from jaxmoe.parallel.pipelines.action import Action
from jaxmoe.parallel.pipelines.stage_placement import Placement, straight
from jaxmoe.parallel.pipelines.table import Table


def gpipe(num_devices: int, num_micro: int) -> Table:
  """Returns m forward passes, then m backward passes, on every device; in flight are all m."""
  orders = [
    tuple(Action(device, kind, micro) for kind in ("F", "BW") for micro in range(num_micro))
    for device in range(num_devices)
  ]
  return Table(straight(num_devices), num_micro, tuple(orders))


def forward_only(placement: Placement, num_micro: int) -> Table:
  """Returns forward passes alone, for evaluation: of a device's stages the deepest that can."""
  ends: dict[tuple[int, int], int] = {}
  orders: list[list[Action]] = [[] for _ in range(placement.num_devices)]
  tick = 0
  while len(ends) < placement.num_stages * num_micro:
    for device, order in enumerate(orders):
      for stage in reversed(placement.stages_on(device)):
        micro = sum(action.stage == stage for action in order)
        if micro < num_micro and (stage == 0 or ends.get((stage - 1, micro), tick) < tick):
          order.append(Action(stage, "F", micro))
          ends[stage, micro] = tick
          break
    tick += 1
  return Table(placement, num_micro, tuple(map(tuple, orders)))
