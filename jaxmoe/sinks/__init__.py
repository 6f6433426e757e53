"""Sinks: places besides the workdir that a run's metrics go to, named on the command line.

They are a matter of where a run runs, not of its recipe. To add one, write its file and add one
line to SINKS; `jaxmoe/train/sinks.py` says what a sink is.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping

from jaxmoe.core.config_io import unknown
from jaxmoe.core.errors import InputError
from jaxmoe.sinks.tensorboard import TensorBoard
from jaxmoe.sinks.wandb import WandB
from jaxmoe.train.sinks import Sink

Environment = Mapping[str, str]
"""Variables by name, as `os.environ` has them."""

SINKS: dict[str, Callable[[pathlib.Path, Environment], Sink]] = {
  "tensorboard": TensorBoard, "wandb": WandB,
}  # fmt: skip


def make_sinks(names: str, workdir: pathlib.Path, env: Environment) -> tuple[Sink, ...]:
  """Returns the sinks of `name,name` for the run in `workdir`; nothing is started or written.

  Raises:
    InputError: no such sink, one named twice, or its package is not installed.
  """
  chosen = [name.strip() for name in names.split(",") if name.strip()]
  for name in chosen:
    if name not in SINKS:
      raise unknown("--sinks", "sink", name, SINKS)
    if chosen.count(name) > 1:
      raise InputError(f"--sinks={names}: {name} is given twice")
  return tuple(SINKS[name](workdir, env) for name in chosen)


__all__ = ["SINKS", "TensorBoard", "WandB", "make_sinks"]
