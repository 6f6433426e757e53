"""ZB-H1 (Qi et al. 2023, arXiv:2401.10241, section 3): 1F1B whose weight gradients wait."""

from jaxmoe.parallel.pipelines.order_list import OrderList
from jaxmoe.parallel.pipelines.stage_placement import straight
from jaxmoe.parallel.pipelines.table import Table


def zb_h1(num_devices: int, num_micro: int) -> Table:
  """Returns 1F1B with B apart from W, and W put off by d microbatches on device d.

  So gradients reach the first device sooner and all devices have the memory of its p microbatches;
  what was put off fills the end. With F = B = W = 1 a step takes 3m + p - 1.
  """
  orders = []
  for device in range(num_devices):
    order = OrderList(num_micro)
    warmup = min(num_devices - device - 1, num_micro)
    for step in range(num_micro + warmup):
      if step < num_micro:
        order.forward(device)
      if step >= warmup:
        order.backward(device)
        if step >= warmup + device:
          order.weights()
    orders.append(order.finish())
  return Table(straight(num_devices), num_micro, tuple(orders))
