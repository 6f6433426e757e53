"""Dispatchers: from a Routing to outputs of experts, with every dropped choice counted.

A dispatcher is a record called as `dispatch(x_TD, routing, experts) -> (y_TD, dropped)`. To add
one, write its file, add one line to DISPATCHERS, and the contract test runs it.
"""

from jaxmoe.moe.dispatch.capacity import Capacity
from jaxmoe.moe.dispatch.dense import Dense
from jaxmoe.moe.dispatch.dropless import Dropless

DISPATCHERS = {
  "dense": (Dense, Dense()),
  "capacity": (Capacity, Capacity(factor=1.25)),
  "dropless": (Dropless, Dropless()),
}

__all__ = ["DISPATCHERS", "Capacity", "Dense", "Dropless"]
