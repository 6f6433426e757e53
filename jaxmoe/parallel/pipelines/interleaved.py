"""Interleaved 1F1B (Narayanan et al. 2021, section 2.2): several stages a device, round robin."""

from jaxmoe.parallel.pipelines.order_list import OrderList, require_micro
from jaxmoe.parallel.pipelines.stage_placement import straight
from jaxmoe.parallel.pipelines.table import Table


def interleaved(num_devices: int, num_micro: int, num_local: int = 2) -> Table:
  """Returns the order of Megatron: rounds of microbatches go through a device's stages in turn.

  Rounds have p microbatches; where m is no multiple of p (Megatron refuses those) they have more,
  as evenly as can be. The bubble is that of 1F1B divided by `num_local`.
  """
  require_micro("interleaved", num_devices, num_micro)
  num_rounds = num_micro // num_devices
  rounds = [num_micro // num_rounds + (i < num_micro % num_rounds) for i in range(num_rounds)]
  locals_in_order = [local for size in rounds for local in range(num_local) for _ in range(size)]
  total = len(locals_in_order)
  orders = []
  for device in range(num_devices):
    order = OrderList(num_micro)
    warmup = min((num_local - 1) * rounds[0] + 2 * (num_devices - device - 1), total)
    for step in range(total + warmup):
      if step < total:
        order.forward(locals_in_order[step] * num_devices + device)
      if step >= warmup:
        local = num_local - 1 - locals_in_order[step - warmup]
        order.both(local * num_devices + device)
    orders.append(order.finish())
  return Table(straight(num_devices, num_local), num_micro, tuple(orders))
