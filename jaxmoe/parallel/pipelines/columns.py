"""A table lowered to static columns: what each device does at each tick, and where things lie.

The engine is one scan over ticks. A tick, on every device alike:

1. Where `embed[tick]` is a microbatch (the vocabulary lies over all devices), all of them look its
   tokens up; the sum is written to slot `f_input` of `inputs` on the device of stage 0.
2. The pass of `kind[device, tick]` is done, in a branch. It reads slots and sees what they held
   before anything that this tick makes is written.
3. Every permute of `channels` runs, outside of branches, idle devices with zeros.
4. What was made or came is written: a slot that was read for the last time in this tick may be
   written in it. Slot -1 is none: nothing is read, nothing written.
5. Where `unembed[tick]` is a microbatch, the gradient that stage 0 has just made of its input goes
   to all devices, each of which adds its rows' share to the gradient of the embedding.

Pools of slots, on every device, `slots` tells how many of each:

- `inputs`: the message (stream, carry) that a stage takes: from its arrival until its forward pass
  or, with keep="input", until the last pass that makes the stage again from it.
- `grads`: the gradient of a stage's output: from its arrival until its `B` or `BW`.
- `kept`: what a forward pass (or `R`) keeps for the backward pass of the same stage.
- `deferred`: what `B` leaves for `W`: inputs and output gradients of products by weights.
- `vocabulary`: what `S` leaves for `T`, on every device.

Stage 0 takes no message but where the embedding lies over all devices: it looks its tokens up, and
again where it is made again. The last stage has no gradient to take, but where the head lies over
all devices: it makes the loss and begins with its gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from jaxmoe.parallel.pipelines.stage_placement import Placement, Route

Direction = Literal["forward", "backward"]
Keep = Literal["input", "residuals"]


@dataclasses.dataclass(frozen=True)
class Slots:
  """How many slots of each pool a device has; the same on all, that of the fullest."""

  inputs: int = 0
  grads: int = 0
  kept: int = 0
  deferred: int = 0
  vocabulary: int = 0


@dataclasses.dataclass(frozen=True)
class Delivery:
  """One way of messages: `forward` (stream, carry) to the next stage, `backward` its gradient.

  Attributes:
    flow: Which; forward messages are written to `inputs`, backward ones to `grads`.
    route: "right": device d's goes to d + 1 mod p; "left": to d - 1 mod p; "here": it stays.
    sends_PK: bool: whether what the device makes at the tick goes this way; zeros where not.
    slot_PK: Where a device writes what came this way, at the end of the tick; -1: nothing came.
  """

  flow: Direction
  route: Route
  sends_PK: np.ndarray
  slot_PK: np.ndarray


@dataclasses.dataclass(frozen=True)
class Columns:
  """Static int32 arrays (P devices, K ticks); -1 where there is none.

  A pass has up to two halves: `f_` of `F`, `R`, `S` and the forward of `FB`; `b_` of `B`, `W`,
  `BW`, `T` and the backward of `FB`. Both have a stage, by its local slot (place in `stages_PN`),
  and a microbatch.

  Attributes:
    placement: Where stages lie.
    num_micro: Microbatches.
    keep: What a forward pass keeps: "input": only what came (a backward pass makes the stage
      again); "residuals": what its backward pass needs, in `kept`.
    stages_PN: The stages of each device, in the order of layers.
    slots: Slots of each pool.
    kind: Index into KINDS; 0 is idle.
    f_stage, f_micro: Of the forward half. `S` has microbatches only.
    f_input: Slot of `inputs` that it reads; -1: stage 0 looks its tokens up. `S` reads the last
      stage's output there on that stage's device, -1 on others: they get it by a broadcast.
    f_kept: Slot of `kept` that it writes; -1: it keeps nothing (forward only, or keep="input"
      where no `R` makes residuals).
    b_stage, b_micro: Of the backward half. `T` has microbatches only.
    b_input: Slot of `inputs` from which the backward pass makes the stage again; -1: from `b_kept`,
      or, where that is -1 too, stage 0 from its tokens.
    b_kept: Slot of `kept` that `B` or `BW` reads.
    b_grad: Slot of `grads` that `B` or `BW` reads; -1: the last stage, from its loss.
    b_deferred: Slot of `deferred`: written by `B`, read by `W`.
    vocabulary: Slot of `vocabulary`: written by `S`, read by `T`.
    embed: (K,): the microbatch that all devices look up before the passes of the tick.
    unembed: (K,): the microbatch whose embedding gets its gradient after the passes of the tick.
    channels: What is sent and where it is written; those with route "here" need no permute. The
      gradient of the last stage's output, which `S` (algorithm 2) or `T` (algorithm 1) makes, comes
      the way ("backward", "here") on the device of the last stage.
  """

  placement: Placement
  num_micro: int
  keep: Keep
  stages_PN: np.ndarray
  slots: Slots
  kind: np.ndarray
  f_stage: np.ndarray
  f_micro: np.ndarray
  f_input: np.ndarray
  f_kept: np.ndarray
  b_stage: np.ndarray
  b_micro: np.ndarray
  b_input: np.ndarray
  b_kept: np.ndarray
  b_grad: np.ndarray
  b_deferred: np.ndarray
  vocabulary: np.ndarray
  embed: np.ndarray
  unembed: np.ndarray
  channels: tuple[Delivery, ...]

  @property
  def num_ticks(self) -> int:
    """Ticks of a step."""
    return self.kind.shape[1]

  @property
  def num_permutes(self) -> int:
    """Permutes of messages in a step, a device: every channel that leaves it, every tick."""
    return self.num_ticks * sum(channel.route != "here" for channel in self.channels)
