"""Tables simulated: how long a step takes, how long devices idle, what is in flight.

Two clocks. With true dependencies a pass starts once what it needs is there and its device is free:
what papers count. In lock-step ticks, as the engine's one scan runs, a tick takes as long as its
longest pass. Both are of the host and of stated durations; nothing here was measured.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

from jaxmoe.parallel.pipelines.action import Action
from jaxmoe.parallel.pipelines.dependencies import Dependencies, Pass, passes
from jaxmoe.parallel.pipelines.table import Table
from jaxmoe.parallel.pipelines.ticks import place_in_ticks


@dataclasses.dataclass(frozen=True)
class Durations:
  """How long each pass of a stage takes, in one unit for all.

  Attributes:
    forward, again, backward, weights: `F`, `R`, `B`, `W`.
    both: `BW`; None is B + W.
    overlapped: `FB`; None is F + BW, nothing hidden.
    scores, head_weights: `S` and `T`, on one device.
    hop: From the end of a pass until another device has its message.
    scale: By stage, what its passes take over those of a mean one; none is 1 for all.
  """

  forward: float = 1.0
  backward: float = 1.0
  weights: float = 1.0
  again: float = 1.0
  both: float | None = None
  overlapped: float | None = None
  scores: float = 0.0
  head_weights: float = 0.0
  hop: float = 0.0
  scale: tuple[float, ...] = ()

  def of(self, action: Action) -> float:
    """Returns the time of a pass."""
    both = self.backward + self.weights if self.both is None else self.both
    times = {
      "F": self.forward, "R": self.again, "B": self.backward, "W": self.weights, "BW": both,
      "FB": self.forward + both if self.overlapped is None else self.overlapped,
      "S": self.scores, "T": self.head_weights,
    }  # fmt: skip
    if not self.scale or action.stage < 0:
      return times[action.kind]
    scales = [self.scale[part.stage] for part in action.parts]
    return times[action.kind] * sum(scales) / len(scales)


@dataclasses.dataclass(frozen=True)
class Simulated:
  """A step.

  Attributes:
    time: From the first pass to the end of the last.
    busy: By device, the time that its passes take.
    in_flight: By device, the most microbatches whose activations it holds at once, from the start
      of a forward pass until the end of its `W` or `BW`; a stage of several counts as its share.
  """

  time: float
  busy: tuple[float, ...]
  in_flight: tuple[float, ...]

  @property
  def idle(self) -> tuple[float, ...]:
    """By device, the time without a pass."""
    return tuple(self.time - busy for busy in self.busy)

  @property
  def bubble(self) -> float:
    """The share of all devices' time without a pass."""
    return sum(self.idle) / (self.time * len(self.busy))


Span = tuple[float, float, Action]
"""Start, end, pass."""


def simulate(table: Table, durations: Durations) -> Simulated:
  """Returns a step with true dependencies.

  Raises:
    TableError: If devices wait for each other for ever.
  """
  return _simulated(table, true_spans(table, durations))


def simulate_ticks(table: Table, durations: Durations) -> Simulated:
  """Returns a step in lock-step ticks.

  Raises:
    TableError: If devices wait for each other for ever.
  """
  return _simulated(table, tick_spans(table, durations))


def tick_spans(table: Table, durations: Durations | None = None) -> list[list[Span]]:
  """Returns by device when each pass starts and ends in lock step; without durations in ticks."""
  spans: list[list[Span]] = [[] for _ in table.orders]
  start = 0.0
  for row in place_in_ticks(table):
    times = [durations.of(action) if durations and action else 1.0 for action in row]
    for device, action in enumerate(row):
      if action:
        spans[device].append((start, start + times[device], action))
    start += max(time for time, action in zip(times, row) if action)
    start += durations.hop if durations else 0.0
  return spans


def true_spans(table: Table, durations: Durations) -> list[list[Span]]:
  """Returns by device when each pass starts and ends."""
  place_in_ticks(table)  # raises where there is a deadlock
  ends = _Ends(table, durations.hop)
  spans: list[list[Span]] = [[] for _ in table.orders]
  left = sum(map(len, table.orders))
  while left:
    for device, order in enumerate(table.orders):
      while len(spans[device]) < len(order):
        action = order[len(spans[device])]
        ready = ends.ready(action, device)
        if ready is None:
          break
        start = max(ready, spans[device][-1][1] if spans[device] else 0.0)
        spans[device].append((start, start + durations.of(action), action))
        ends.add(action, device, spans[device][-1][1])
        left -= 1
  return spans


class _Ends:
  """When passes end; one that all devices do ends with the last of them."""

  def __init__(self, table: Table, hop: float):
    self._needs, self._hop, self._size = Dependencies(table), hop, len(table.orders)
    self._ends: dict[Pass, float] = {}
    self._devices: Counter[Pass] = Counter()
    self._home = table.placement.device_of

  def add(self, action: Action, device: int, end: float) -> None:
    """Notes an end."""
    for found in passes(action):
      self._ends[found] = max(end, self._ends.get(found, end))
      self._devices[found] += 1

  def ready(self, action: Action, device: int) -> float | None:
    """Returns when all that a pass needs is there; None if some of it has no end yet."""
    needed = [need for found in passes(action) for need in self._needs.needs(found)]
    if any(self._devices[need] < (self._size if need[0] < 0 else 1) for need in needed):
      return None
    return max((self._ends[need] + self._travel(need, device) for need in needed), default=0.0)

  def _travel(self, need: Pass, device: int) -> float:
    """Returns how long a message is on its way; none on the device that made it."""
    return 0.0 if need[0] >= 0 and self._home[need[0]] == device else self._hop


def _simulated(table: Table, spans: list[list[Span]]) -> Simulated:
  """Returns a step of passes with their times."""
  begin = min(start for row in spans for start, _, _ in row)
  finish = max(end for row in spans for _, end, _ in row)
  busy = tuple(sum(end - start for start, end, _ in row) for row in spans)
  share = table.placement.num_local
  return Simulated(finish - begin, busy, tuple(_most(row) / share for row in spans))


def _most(row: list[Span]) -> int:
  """Returns the most stages' microbatches that a device holds at once."""
  held = most = 0
  for _, change in sorted(_changes(row)):
    held += change
    most = max(most, held)
  return most


def _changes(row: list[Span]) -> Iterator[tuple[float, int]]:
  """Yields when a microbatch comes and goes; who goes does so before another comes."""
  for start, end, action in row:
    for _, kind, _ in passes(action):
      if kind == "F":
        yield start, 1
      elif kind in ("W", "BW"):
        yield end, -1
