"""DualPipe (DeepSeek-V3, section 3.2.1) cut in half: a V in place of two opposite pipelines.

Two devices of DualPipe that hold the same stages are one here, and the model lies once over p
devices where DualPipe lays it twice over PP = 2p. In steady state every pass is an `FB`.
"""

from jaxmoe.parallel.pipelines.order_list import OrderList, require_micro
from jaxmoe.parallel.pipelines.stage_placement import v_shape
from jaxmoe.parallel.pipelines.table import Table


def dualpipe_v(num_devices: int, num_micro: int) -> Table:
  """Returns the eight phases that DeepSeek published.

  With fewer than 2p microbatches those that lack are left out.
  """
  require_micro("dualpipe_v", num_devices, num_micro)
  orders = []
  for device in range(num_devices):
    order = OrderList(num_micro)
    _fill(order, device, num_devices, max(num_micro, 2 * num_devices))
    orders.append(order.finish())
  return Table(v_shape(num_devices), num_micro, tuple(orders))


def _fill(order: OrderList, device: int, num_devices: int, num_micro: int) -> None:
  """Adds the phases of one device; `after` is how many devices lie between it and the turn."""
  first, second = device, 2 * num_devices - 1 - device
  after = num_devices - device - 1
  for _ in range(2 * after):
    order.forward(first)
  for _ in range(device + 1):
    order.forward(first)
    order.forward(second)
  for _ in range(after):
    order.backward(second)
    order.weights()
    order.forward(second)
  for step in range(num_micro - 2 * num_devices + device + 1):
    if step == 0 and after == 0:
      # Side by side they would end later than one after the other: the turn waits for both.
      order.forward(first)
      order.both(second)
    else:
      order.overlap(first, second)
    order.overlap(second, first)
  for _ in range(after):
    order.both(second)
    order.overlap(second, first)
  _drain(order, device, num_devices)


def _drain(order: OrderList, device: int, num_devices: int) -> None:
  """Adds the backward passes left; of the later half weight gradients wait and fill the gaps."""
  first, second = device, 2 * num_devices - 1 - device
  passes = [stage for _ in range(device + 1) for stage in (second, first)]
  for place, stage in enumerate(passes):
    if place > device:
      order.backward(stage)
    else:
      order.both(stage)
  for _ in range(num_devices - device - 1):
    order.weights()
    order.backward(first)
