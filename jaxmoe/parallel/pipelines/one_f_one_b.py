"""1F1B (Narayanan et al. 2019, 2021): after a warm-up each forward is followed by a backward."""

from jaxmoe.parallel.pipelines.action import Action
from jaxmoe.parallel.pipelines.stage_placement import straight
from jaxmoe.parallel.pipelines.table import Table


def one_f_one_b(num_devices: int, num_micro: int) -> Table:
  """Returns the order of PipeDream-Flush: device d has at most p - d microbatches in flight."""
  orders = []
  for device in range(num_devices):
    warmup = min(num_devices - device - 1, num_micro)
    order = [Action(device, "F", micro) for micro in range(warmup)]
    for micro in range(num_micro - warmup):
      order += [Action(device, "F", micro + warmup), Action(device, "BW", micro)]
    order += [Action(device, "BW", micro) for micro in range(num_micro - warmup, num_micro)]
    orders.append(tuple(order))
  return Table(straight(num_devices), num_micro, tuple(orders))
