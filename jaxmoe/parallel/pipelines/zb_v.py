"""ZB-V (Qi et al. 2023, arXiv:2401.10241, section 6): no bubble where F, B and W take as long."""

from jaxmoe.parallel.pipelines.order_list import OrderList, require_micro
from jaxmoe.parallel.pipelines.stage_placement import v_shape
from jaxmoe.parallel.pipelines.table import Table


def zb_v(num_devices: int, num_micro: int) -> Table:
  """Returns the order drawn by hand in the paper; in flight are p microbatches, as with 1F1B.

  With fewer than 2p - 1 microbatches, which it takes to fill the V, those that lack are left out.
  """
  require_micro("zb_v", num_devices, num_micro)
  orders = []
  for device in range(num_devices):
    order = OrderList(num_micro)
    _fill(order, device, num_devices, max(num_micro, 2 * num_devices - 1))
    orders.append(order.finish())
  return Table(v_shape(num_devices), num_micro, tuple(orders))


def _fill(order: OrderList, device: int, num_devices: int, num_micro: int) -> None:
  """Adds warm-up, steady state and cool-down of one device."""
  first, second = device, 2 * num_devices - 1 - device
  for _ in range(2 * (num_devices - device) - 1):
    order.forward(first)
  for _ in range(device):
    order.forward(second)
    order.forward(first)
  for _ in range(num_devices - device):
    order.forward(second)
    order.backward(second)
    order.weights()
  while order.done(second, "F") < num_micro:
    if order.done(first, "F") < num_micro:
      order.forward(first)
    for stage in (first, second):
      if stage == second:
        order.forward(second)
      order.backward(stage)
      order.weights()
  for _ in range(device):
    order.backward(first)
    order.backward(second)
  for _ in range(num_devices - device):
    order.backward(first)
    order.weights(first)
