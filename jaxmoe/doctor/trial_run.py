"""A trial of a machine: its devices, three steps trained, and restored."""

from __future__ import annotations

import pathlib
from typing import Any

import jax

from jaxmoe.core.config_io import override
from jaxmoe.core.layout import one_device
from jaxmoe.data.corpus import open_corpus
from jaxmoe.recipes import RECIPES
from jaxmoe.train.kernel_choices import by_operation, last_told
from jaxmoe.train.run_log import read_lines
from jaxmoe.train.trainer import Trainer
from jaxmoe.train.workdir import Workdir

CHANGES = {
  "train.num_steps": "3", "evaluation.every": "0", "samples.every": "0", "train.log_every": "1"
}  # fmt: skip


def described(device: jax.Device) -> dict[str, Any]:
  """Returns what a device is, and its memory in bytes where it tells."""
  memory = (device.memory_stats() or {}) if hasattr(device, "memory_stats") else {}
  limit = memory.get("bytes_limit")
  return {"platform": device.platform, "kind": device.device_kind, "memory_bytes": limit}


def train_and_restore(folder: pathlib.Path) -> dict[str, Any]:
  """Trains three steps, then goes on from the checkpoint, which has nothing left to do.

  Returns:
    `losses`; `equal`, whether the digest of the state that was restored is that of the state that
    was saved; `kernels`, the back ends by operation.
  """
  experiment = override(RECIPES["tiny"](), list(CHANGES.items()))
  corpus = open_corpus(experiment.data, None)
  for _ in range(2):
    workdir = Workdir(folder / "run")
    Trainer(experiment, workdir, corpus, one_device()).fit()
    workdir.release()
  events = list(read_lines(workdir.events))
  done = [event for event in events if event["event"] == "done"]
  digests = [event["digest"] for event in done]
  losses = [line["loss"] for line in read_lines(workdir.metrics)]
  equal = len(digests) == 2 and len(set(digests)) == 1
  return {"losses": losses, "equal": equal, "kernels": by_operation(last_told(events))}
