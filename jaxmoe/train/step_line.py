"""The line of metrics.jsonl of a step, from what the step was dispatched with and returned.

A line's seconds are those between the moment at which the step before was done and that at which
its own was, whenever the two were dispatched and fetched; with what hooks took behind them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

from jaxmoe.core.param_names import LayerGroupSizes
from jaxmoe.train.completion import Completion
from jaxmoe.train.step_summary import summarize
from jaxmoe.train.wall_clock import WallClock


@dataclasses.dataclass
class DispatchedStep:
  """A step that was dispatched, and what its line needs.

  Attributes:
    step: Its number.
    metrics: What it will return.
    data: What the stream says of itself once its batch was drawn.
    since_busy_s: Processor seconds of the thread that works ahead, up to the step before.
    completion: When it was done.
  """

  step: int
  metrics: Any
  data: Mapping[str, Any]
  since_busy_s: float
  completion: Completion


def step_line(
  dispatched: DispatchedStep,
  extra: Mapping[str, Any] | None,
  layer_groups: LayerGroupSizes,
  clock: WallClock,
  flops_s: tuple[float, float],
) -> dict[str, Any]:
  """Returns the line of a step; waits for it.

  Args:
    dispatched: The step.
    extra: What hooks returned behind it; its seconds then end now, and not when it was done.
    layer_groups: How layers are grouped in memory.
    clock: Where its seconds are booked.
    flops_s: (model FLOPs of a step, the measured peak per second).
  """
  line = {
    "step": dispatched.step,
    **summarize(dispatched.metrics, layer_groups),
    "data": dispatched.data["domains"],
    **(extra or {}),
  }
  dispatched.completion.look()
  until_s = dispatched.completion.at if extra is None else math.inf
  line["time"] = _times(dispatched, line["tokens"], clock.take("step", until_s), flops_s)
  return line


def _times(
  dispatched: DispatchedStep, tokens: float, seconds: dict[str, float],
  flops_s: tuple[float, float],
) -> dict[str, Any]:  # fmt: skip
  """Returns the `time` entry of a line; speeds count waiting for data as a part of the step.

  A checkpoint's stall is in the line after it, since the line of its step comes first.
  """
  loader = dispatched.data["time"]
  step_s = max(seconds["step"] + seconds.get("data", 0.0), 1e-9)
  flops_per_step, peak_flops_per_s = flops_s
  return {
    "unix_s": round(time.time(), 3),
    "tokens_per_s": round(tokens / step_s, 1),
    "mfu": round(flops_per_step / step_s / peak_flops_per_s, 4),
    "data_share": round((loader["busy_s"] - dispatched.since_busy_s) / step_s, 4),
    "data_mb_per_s": round(loader["mb_per_s"], 3),
    "seconds": seconds,
  }
