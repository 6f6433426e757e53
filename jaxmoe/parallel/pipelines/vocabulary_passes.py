"""Passes of a head that lies over all devices, put into a table (Yeung et al. 2024).

Every device holds a share of the vocabulary. `S(i)` makes its logits of microbatch i, once the last
stage has run; collectives, the barriers, make one softmax of all shares; then the last stage's
backward pass may start. A barrier hides behind the passes of an interval (the time of a microbatch
in steady state), so backward passes come an interval later for each, and one more microbatch is in
flight (section 5).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxmoe.parallel.pipelines.action import Action, overlapped
from jaxmoe.parallel.pipelines.simulation import Durations, tick_spans, true_spans
from jaxmoe.parallel.pipelines.table import Table, Vocabulary

Clock = Literal["ticks", "true"]
_ORDER = ("B", "BW", "FB", "R", "W", "F", "S", "T")
"""Of passes that fall on one time: gradients first, which others wait for and which free memory."""


def with_vocabulary(table: Table, vocabulary: Vocabulary, clock: Clock = "ticks") -> Table:
  """Returns a table of stages with `S` and `T` of every microbatch on every device.

  `S(i)` comes right after the last stage's forward pass. `T(i)` is half an interval later, so that
  both are evenly spaced; with algorithm 1 a whole one, behind the first barrier, for the last
  stage's backward pass waits for it. One order on all devices. Forward tables get `S` only.

  Args:
    table: One whose last stage has the head so far.
    vocabulary: Which algorithm.
    clock: By what time passes are ordered: the engine's ticks, in which all devices do `S` at once,
      or true dependencies with F = B = W.
  """
  assert table.vocabulary is None, "a table has one head"
  ticks = clock == "ticks"
  interval = _interval(table, ticks)
  trains = any(action.kind in ("B", "BW", "FB") for order in table.orders for action in order)
  timed: list[list[tuple[float, Action]]] = [[] for _ in table.orders]
  for device, row in enumerate(tick_spans(table) if ticks else true_spans(table, Durations())):
    for start, end, action in row:
      timed[device] += _moved(action, start, vocabulary.barriers * interval)
      if action.stage == table.placement.num_stages - 1 and action.kind in ("F", "FB"):
        first = end - 0.5 if ticks else end
        second = first + interval / vocabulary.algorithm
        shared = [(first, Action(-1, "S", action.micro))]
        shared += [(second, Action(-1, "T", action.micro))] if trains else []
        for each in timed:
          each.extend(shared)
  pairs = any(action.kind == "FB" for order in table.orders for action in order)
  orders = tuple(_in_order(each, pairs) for each in timed)
  return dataclasses.replace(table, orders=orders, vocabulary=vocabulary)


def _in_order(timed: list[tuple[float, Action]], pairs: bool) -> tuple[Action, ...]:
  """Returns a device's passes in order of time; an `F` and a `BW` of one time pair as before."""
  order: list[Action] = []
  times: list[float] = []
  for time, action in sorted(timed, key=_by_time):
    if pairs and times and times[-1] == time and (order[-1].kind, action.kind) == ("BW", "F"):
      order[-1] = overlapped(action, order[-1])
    else:
      order.append(action)
      times.append(time)
  return tuple(order)


def _by_time(timed: tuple[float, Action]) -> tuple[float, int, int]:
  """Returns what passes are ordered by, on all devices alike."""
  return timed[0], _ORDER.index(timed[1].kind), timed[1].micro


def _interval(table: Table, ticks: bool) -> int:
  """Returns the time between microbatches in steady state: that of a device's passes."""
  kinds = {action.kind for order in table.orders for action in order}
  passes = 3 if not ticks or "W" in kinds else 2
  return table.placement.num_local * (1 if ticks and "FB" in kinds else passes)


def _moved(action: Action, start: float, later: float) -> list[tuple[float, Action]]:
  """Returns a pass and its time, backward ones later; the halves of an `FB` part."""
  if action.back is not None:
    return [(start, action.parts[0]), (start + later, action.back)]
  return [(start if action.kind == "F" else start + later, action)]
