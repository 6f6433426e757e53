"""Suites by name, each a module with `run(asked, results)`; imported when they are asked for.

A machine that runs kernels alone need not have what whole models need, such as data and
checkpoints.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Suite:
  """A suite.

  Attributes:
    what: What it measures.
    shapes: The shapes it has, those before `default_shapes` runs out by default.
    default_shapes: How many of them run where none is named.
    rivals: Who can run beside us; all of them do where none is named.
    on_devices: How many shapes run by default on a device that is no CPU; None for the same.
  """

  what: str
  shapes: tuple[str, ...] = ()
  default_shapes: int = 0
  rivals: tuple[str, ...] = ()
  on_devices: int | None = None


SUITES = {
  "step": Suite(
    "a whole training step", ("quickstart", "small8", "small64", "tiny"), 3, ("torch",),
  ),
  "decode": Suite(
    "tokens one by one, 16 rows at once, and a prompt of 480",
    ("small8", "small64", "quickstart", "tiny"), 1, ("torch", "llama_cpp"),
  ),
  "start": Suite("from nothing to the first step, and to the first tokens"),
  "attention": Suite(
    "attention at four lengths, forward and backward", rivals=("torch", "tokamax"),
  ),
  "kernels": Suite(
    "every back end of every operation", ("small8", "olmoe", "mixtral", "qwen3"), 1,
    ("torch", "tokamax"), on_devices=4,
  ),
  "scaling": Suite("cost against experts, tokens, layers, length and devices"),
}  # fmt: skip
