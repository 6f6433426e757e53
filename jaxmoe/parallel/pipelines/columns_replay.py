"""Columns run with names in place of arrays: does every pass find what it is meant to find?

Written from the contract of Columns alone, so that it sees what a lowering does wrong: a slot
written twice in a tick or while it is needed, a message that nobody keeps, a slot out of bounds.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmoe.parallel.pipelines.action import KINDS
from jaxmoe.parallel.pipelines.columns import Columns, Delivery

Name = tuple[str, int, int]
"""What lies in a slot: what it is, of which stage, of which microbatch."""


class ReplayError(AssertionError):
  """Columns that do not compute their table: a defect of a lowering, never a user's mistake."""


@dataclasses.dataclass(frozen=True)
class Done:
  """What one device did in one tick: its kind, and stage and microbatch of each half."""

  device: int
  tick: int
  kind: str
  stage: int
  micro: int


def replay(columns: Columns) -> list[Done]:
  """Returns all passes in the order of ticks, an `FB` as an `F` and a `BW`.

  Raises:
    ReplayError: At the first pass that reads anything but what it should.
  """
  return _Replay(columns).run()


class _Replay:
  def __init__(self, columns: Columns):
    self.columns = columns
    self.placement = columns.placement
    self.last = self.placement.num_stages - 1
    self.pools: dict[tuple[int, str, int], Name] = {}
    self.writes: dict[tuple[int, str, int], Name] = {}
    self.sent: dict[tuple[int, str], Name] = {}
    self.done: list[Done] = []

  def run(self) -> list[Done]:
    for tick in range(self.columns.num_ticks):
      self.writes, self.sent = {}, {}
      self.embed(tick)
      for device in range(self.placement.num_devices):
        self.act(device, tick)
      for channel in self.columns.channels:
        for device in range(self.placement.num_devices):
          self.receive(channel, device, tick)
      if self.sent:
        raise ReplayError(f"tick {tick}: nobody takes {sorted(self.sent.values())}")
      self.pools |= self.writes
    return self.done

  def at(self, name: str, device: int, tick: int) -> int:
    return int(getattr(self.columns, name)[device, tick])

  def embed(self, tick: int) -> None:
    micro = int(self.columns.embed[tick])
    if micro >= 0:
      device = self.placement.device_of[0]
      self.pools[device, "inputs", self.at("f_input", device, tick)] = ("input", 0, micro)

  def act(self, device: int, tick: int) -> None:
    kind = KINDS[self.at("kind", device, tick)]
    for part in {"idle": (), "FB": ("F", "BW")}.get(kind, (kind,)):
      half = "f" if part in ("F", "R", "S") else "b"
      local, micro = self.at(f"{half}_stage", device, tick), self.at(f"{half}_micro", device, tick)
      stage = -1 if part in ("S", "T") else int(self.columns.stages_PN[device, local])
      getattr(self, f"do_{part}")(device, tick, stage, micro)
      self.done.append(Done(device, tick, part, stage, micro))

  def read(self, column: str, pool: str, where: tuple[int, int], name: Name) -> None:
    device, tick = where
    slot = self.at(column, device, tick)
    found = self.pools.get((device, pool, slot))
    if found != name:
      raise ReplayError(
        f"device {device}, tick {tick}: {name} is looked for in {column}={slot}, there is {found}"
      )

  def write(self, pool: str, where: tuple[int, int], slot: int, name: Name) -> None:
    key = (where[0], pool, slot)
    if not 0 <= slot < getattr(self.columns.slots, pool):
      raise ReplayError(f"device {where[0]}, tick {where[1]}: {name} goes to no slot: {key}")
    if key in self.writes:
      raise ReplayError(f"tick {where[1]}: {name} and {self.writes[key]} are both written to {key}")
    self.writes[key] = name

  def send(self, device: int, flow: str, name: Name) -> None:
    self.sent[device, flow] = name

  def receive(self, channel: Delivery, device: int, tick: int) -> None:
    step = {"right": -1, "left": 1, "here": 0}[channel.route]
    sender = (device + step) % self.placement.num_devices
    slot = int(channel.slot_PK[device, tick])
    if bool(channel.sends_PK[sender, tick]) != (slot >= 0):
      raise ReplayError(f"device {device}, tick {tick}: a message that comes and slot {slot}")
    if slot >= 0:
      name = self.sent.pop((sender, channel.flow), None)
      if name is None:
        raise ReplayError(f"device {sender}, tick {tick}: nothing was made for {channel.route}")
      if name[1] <= self.last and self.placement.device_of[name[1]] != device:
        raise ReplayError(f"tick {tick}: {name} comes to device {device}, where it has no stage")
      self.write("inputs" if channel.flow == "forward" else "grads", (device, tick), slot, name)

  def do_F(self, device: int, tick: int, stage: int, micro: int) -> None:
    where = (device, tick)
    spread = bool((np.asarray(self.columns.embed) >= 0).any())
    if stage or spread:
      self.read("f_input", "inputs", where, ("input", stage, micro))
    kept = self.at("f_kept", device, tick)
    if kept >= 0:
      self.write("kept", where, kept, ("kept", stage, micro))
    if stage < self.last or spread:
      self.send(device, "forward", ("input", stage + 1, micro))

  def do_R(self, device: int, tick: int, stage: int, micro: int) -> None:
    where = (device, tick)
    spread = bool((np.asarray(self.columns.embed) >= 0).any())
    if stage or spread:
      self.read("f_input", "inputs", where, ("input", stage, micro))
    self.write("kept", where, self.at("f_kept", device, tick), ("kept", stage, micro))

  def do_BW(self, device: int, tick: int, stage: int, micro: int) -> None:
    where = (device, tick)
    spread = bool((np.asarray(self.columns.embed) >= 0).any())
    if self.at("b_kept", device, tick) >= 0:
      self.read("b_kept", "kept", where, ("kept", stage, micro))
    elif stage or spread:
      self.read("b_input", "inputs", where, ("input", stage, micro))
    if stage < self.last or spread:
      self.read("b_grad", "grads", where, ("gradient", stage, micro))
    if stage:
      self.send(device, "backward", ("gradient", stage - 1, micro))

  def do_B(self, device: int, tick: int, stage: int, micro: int) -> None:
    self.do_BW(device, tick, stage, micro)
    slot = self.at("b_deferred", device, tick)
    self.write("deferred", (device, tick), slot, ("deferred", stage, micro))

  def do_W(self, device: int, tick: int, stage: int, micro: int) -> None:
    self.read("b_deferred", "deferred", (device, tick), ("deferred", stage, micro))

  def do_S(self, device: int, tick: int, stage: int, micro: int) -> None:
    where = (device, tick)
    if device == self.placement.device_of[self.last]:
      self.read("f_input", "inputs", where, ("input", self.last + 1, micro))
    slot = self.at("vocabulary", device, tick)
    if slot >= 0:
      self.write("vocabulary", where, slot, ("vocabulary", -1, micro))
    self.gradient_of_head(device, tick, micro)

  def do_T(self, device: int, tick: int, stage: int, micro: int) -> None:
    self.read("vocabulary", "vocabulary", (device, tick), ("vocabulary", -1, micro))
    self.gradient_of_head(device, tick, micro)

  def gradient_of_head(self, device: int, tick: int, micro: int) -> None:
    here = [c for c in self.columns.channels if (c.flow, c.route) == ("backward", "here")]
    if here and device == self.placement.device_of[self.last] and here[0].sends_PK[device, tick]:
      self.send(device, "backward", ("gradient", self.last, micro))
