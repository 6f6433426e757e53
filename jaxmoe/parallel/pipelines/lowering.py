"""Tables lowered to Columns: ticks, ways of messages, slots."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmoe.parallel.pipelines.action import KINDS
from jaxmoe.parallel.pipelines.columns import Columns, Delivery, Direction, Keep, Slots
from jaxmoe.parallel.pipelines.dependencies import Dependencies, Pass, passes
from jaxmoe.parallel.pipelines.slots import Stay, assign_slots
from jaxmoe.parallel.pipelines.stage_placement import Placement, Route
from jaxmoe.parallel.pipelines.table import Table
from jaxmoe.parallel.pipelines.ticks import Grid, place_in_ticks

POOLS = tuple(field.name for field in dataclasses.fields(Slots))
FIELDS = (
  "kind", "f_stage", "f_micro", "f_input", "f_kept", "b_stage", "b_micro", "b_input", "b_kept",
  "b_grad", "b_deferred", "vocabulary",
)  # fmt: skip


def lower(table: Table, keep: Keep = "input") -> Columns:
  """Returns the columns that the engine runs.

  Args:
    table: What devices do.
    keep: What a forward pass keeps for the backward pass of its stage: its input or its residuals.

  Raises:
    InputError: If the table ends in a deadlock.
  """
  return _Lowering(table, keep).columns()


class _Lowering:
  """Fills the arrays of one table."""

  def __init__(self, table: Table, keep: Keep):
    self.table, self.keep = table, keep
    self.placement: Placement = table.placement
    self.last = self.placement.num_stages - 1
    self.head_device = self.placement.device_of[self.last]
    self.needs = Dependencies(table)
    self.grid: Grid = place_in_ticks(table)
    self.tick: dict[Pass, int] = {
      found: tick
      for tick, row in enumerate(self.grid)
      for action in row
      if action
      for found in passes(action)
    }
    self.shape = (self.placement.num_devices, len(self.grid))
    self.arrays = {name: np.full(self.shape, -1, np.int32) for name in FIELDS}
    self.channels: dict[tuple[Direction, Route], Delivery] = {}
    self.slot_of, self.slots = self.assign()

  def stays(self, device: int) -> dict[str, list[Stay]]:
    """Returns by pool what lies on a device, and from when until when."""
    found: dict[str, list[Stay]] = {pool: [] for pool in POOLS}

    def add(pool: str, written: int | None, last_read: int | None, stage: int, micro: int) -> None:
      if written is not None and last_read is not None:
        found[pool].append(Stay(written, last_read, (stage, micro)))

    for micro in range(self.table.num_micro):
      for stage in self.placement.stages_on(device):
        forward, back = self.tick.get((stage, "F", micro)), self.back(stage, micro)
        add("inputs", self.arrival(stage, micro), self.input_read(stage, micro), stage, micro)
        add("kept", self.kept_from(stage, micro), back, stage, micro)
        add("grads", self.gradient_arrival(stage, micro), back, stage, micro)
        add("deferred", back, self.tick.get((stage, "W", micro)), stage, micro)
        if stage == self.last and self.table.vocabulary:
          add("inputs", forward, self.tick.get((-1, "S", micro)), stage + 1, micro)
      add("vocabulary", self.tick.get((-1, "S", micro)), self.tick.get((-1, "T", micro)), -1, micro)
    return found

  def assign(self) -> tuple[dict[tuple[str, int, int], int], Slots]:
    """Returns the slot of (pool, stage, microbatch), of each device its own, and how many."""
    slot_of: dict[tuple[str, int, int], int] = {}
    counts = dict.fromkeys(POOLS, 0)
    for device in range(self.placement.num_devices):
      for pool, stays in self.stays(device).items():
        found, count = assign_slots(stays)
        slot_of |= {(pool, *key): slot for key, slot in found.items()}
        counts[pool] = max(counts[pool], count)
    return slot_of, Slots(**counts)

  def back(self, stage: int, micro: int) -> int | None:
    """Returns the tick of `B` or `BW`."""
    found = self.needs.back(stage, micro)
    return self.tick[found] if found else None

  def arrival(self, stage: int, micro: int) -> int | None:
    """Returns the tick at whose end a stage's input is there; None: it is looked up."""
    if stage:
      return self.tick.get((stage - 1, "F", micro))
    return self.tick[0, "F", micro] - 1 if self.table.vocabulary else None

  def input_read(self, stage: int, micro: int) -> int | None:
    """Returns the last tick that reads a stage's input."""
    again = self.tick.get((stage, "R", micro))
    if again is None and self.keep == "input":
      again = self.back(stage, micro)
    return self.tick.get((stage, "F", micro)) if again is None else again

  def kept_from(self, stage: int, micro: int) -> int | None:
    """Returns the tick at whose end residuals are there; None: there are none."""
    again = self.tick.get((stage, "R", micro))
    if again is None and self.keep == "residuals":
      return self.tick.get((stage, "F", micro))
    return again

  def gradient_arrival(self, stage: int, micro: int) -> int | None:
    """Returns the tick at whose end the gradient of a stage's output is there."""
    if stage < self.last:
      return self.back(stage + 1, micro)
    return self.tick[self.needs.gradient_of_head(micro)] if self.table.vocabulary else None

  def columns(self) -> Columns:
    """Returns all arrays."""
    embed, unembed = (np.full(self.shape[1], -1, np.int32) for _ in range(2))
    for tick, row in enumerate(self.grid):
      for device, action in enumerate(row):
        self.arrays["kind"][device, tick] = KINDS.index(action.kind) if action else 0
        for found in passes(action) if action else ():
          self.fill(device, tick, found)
          self.send(device, tick, found)
          if self.table.vocabulary and found[0] == 0 and found[1] not in ("R", "W"):
            (embed if found[1] == "F" else unembed)[tick] = found[2]
    stages = [self.placement.stages_on(device) for device in range(self.shape[0])]
    return Columns(
      placement=self.placement,
      num_micro=self.table.num_micro,
      keep=self.keep,
      stages_PN=np.array(stages, np.int32),
      slots=self.slots,
      embed=embed,
      unembed=unembed,
      channels=tuple(self.channels.values()),
      **self.arrays,
    )

  def fill(self, device: int, tick: int, found: Pass) -> None:
    """Writes what one pass is and which slots it reads and writes."""
    stage, kind, micro = found
    half = "f" if kind in ("F", "R", "S") else "b"
    values = {f"{half}_micro": micro}
    if kind in ("S", "T"):
      values["vocabulary"] = self.slot("vocabulary", -1, micro)
      if kind == "S" and device == self.head_device:
        values["f_input"] = self.slot("inputs", self.last + 1, micro)
    else:
      values[f"{half}_stage"] = self.placement.local(stage)
      values |= self.slots_of(kind, stage, micro)
    for name, value in values.items():
      self.arrays[name][device, tick] = value

  def slots_of(self, kind: str, stage: int, micro: int) -> dict[str, int]:
    """Returns the slots of a stage's pass by column."""
    deferred = {"b_deferred": self.slot("deferred", stage, micro)}
    if kind == "W":
      return deferred
    source, kept = self.slot("inputs", stage, micro), self.slot("kept", stage, micro)
    again = (stage, "R", micro) in self.tick
    if kind in ("F", "R"):
      return {"f_input": source, "f_kept": -1 if again and kind == "F" else kept}
    made_here = self.keep == "input" and not again
    found = {"b_input": source if made_here else -1, "b_kept": kept}
    return {
      **found,
      "b_grad": self.slot("grads", stage, micro),
      **(deferred if kind == "B" else {}),
    }

  def slot(self, pool: str, stage: int, micro: int) -> int:
    """Returns a slot, or -1 where nothing lies."""
    return self.slot_of.get((pool, stage, micro), -1)

  def send(self, device: int, tick: int, found: Pass) -> None:
    """Writes which way what a pass makes goes, and where it is kept there."""
    stage, kind, micro = found
    if kind == "F" and (stage < self.last or self.table.vocabulary):
      self.deliver("forward", (stage, stage + 1), tick, micro)
    elif kind in ("B", "BW") and stage:
      self.deliver("backward", (stage, stage - 1), tick, micro)
    elif stage < 0 and device == self.head_device and self.slot("grads", self.last, micro) >= 0:
      self.deliver_head(found, tick, micro)

  def deliver_head(self, found: Pass, tick: int, micro: int) -> None:
    """Marks the gradient of the last stage's output, if this `S` or `T` makes it."""
    if found == self.needs.gradient_of_head(micro):
      self.deliver("backward", (self.last + 1, self.last), tick, micro)

  def deliver(self, flow: Direction, way: tuple[int, int], tick: int, micro: int) -> None:
    """Marks one message; to and from a head over all devices it stays with the last stage."""
    here, there = (self.placement.device_of[min(stage, self.last)] for stage in way)
    beyond = self.last + 1 in way
    route: Route = "here" if beyond else self.placement.route(*way)
    channel = self.channels.setdefault(
      (flow, route),
      Delivery(flow, route, np.zeros(self.shape, bool), np.full(self.shape, -1, np.int32)),
    )
    pool = "inputs" if flow == "forward" else "grads"
    assert channel.slot_PK[there, tick] == -1, "one column for two messages"
    channel.sends_PK[here, tick] = True
    channel.slot_PK[there, tick] = self.slot(pool, way[1], micro)
