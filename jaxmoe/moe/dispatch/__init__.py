"""Dispatchers: from a Routing to outputs of experts, with every dropped choice counted.

A dispatcher is a record called as `dispatch(x_TD, routing, experts, context) -> (y_TD, counts)`. To
add one, write its file, add one line to DISPATCHERS, and the contract test runs it. A name may also
stand for settings of another's record.
"""

from jaxmoe.moe.dispatch.capacity import Capacity
from jaxmoe.moe.dispatch.dense import Dense
from jaxmoe.moe.dispatch.device_group import DeviceGroup
from jaxmoe.moe.dispatch.dispatcher import Counts, DispatchContext, Dispatcher
from jaxmoe.moe.dispatch.dropless import Dropless
from jaxmoe.moe.dispatch.einsum import Einsum
from jaxmoe.moe.dispatch.exchange import AllGather, AllToAll

DISPATCHERS = {
  "dense": (Dense, Dense()),
  "capacity": (Capacity, Capacity(factor=1.25)),
  "capacity_score": (Capacity, Capacity(overflow="score", allow_future=True)),
  "capacity_random": (Capacity, Capacity(overflow="random", allow_future=True)),
  "capacity_spill": (Capacity, Capacity(factor=1.0, overflow="spill")),
  "capacity_raise": (Capacity, Capacity(factor=2.0, max_drop_rate=0.0)),
  "einsum": (Einsum, Einsum(factor=1.25)),
  "dropless": (Dropless, Dropless()),
}

EXCHANGES = {
  "all_to_all": (AllToAll, AllToAll()),
  "all_to_all_bounded": (AllToAll, AllToAll(bound=2.0)),
  "all_to_all_chunked": (AllToAll, AllToAll(chunks=2)),
  "all_to_all_two_level": (AllToAll, AllToAll(two_level=True)),
  "all_gather": (AllGather, AllGather()),
}
"""How rows reach experts on other devices; on one device none is used."""

__all__ = [
  "DISPATCHERS",
  "EXCHANGES",
  "AllGather",
  "AllToAll",
  "Capacity",
  "Counts",
  "Dense",
  "DeviceGroup",
  "DispatchContext",
  "Dispatcher",
  "Dropless",
  "Einsum",
]
