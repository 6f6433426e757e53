"""The trial of a machine: its devices, and three steps of the smallest recipe, as JSON lines.

`jaxmoe doctor` runs it as a process of its own: an installation that is broken, or a crash in a
driver, then costs the doctor nothing but this part of what it tells.

python -m jaxmoe.commands.doctor_trial FOLDER
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import time
from typing import Any

import jax

from jaxmoe.commands.process import jax_settings
from jaxmoe.core.layout import one_device
from jaxmoe.cost.peak import best_peak
from jaxmoe.data.corpus import open_corpus
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.run_log import read_lines
from jaxmoe.train.trainer import Trainer
from jaxmoe.train.workdir import Workdir

STEPS = 3
CHANGES = (
  f"train.num_steps={STEPS}", "evaluation.every=0", "samples.every=0", "train.log_every=1"
)  # fmt: skip


def main(folder: pathlib.Path) -> None:
  """Prints what is found, a line of JSON for each part."""
  started = time.monotonic()
  jax_settings.set_up_jax()
  write_result(devices=[described(device) for device in jax.local_devices()])
  with contextlib.redirect_stdout(sys.stderr):
    result = train_and_restore(folder)
  write_result(run={**result, "seconds": round(time.monotonic() - started, 1)})
  on_cpu = jax.default_backend() == "cpu"
  dtypes = ("float32",) if on_cpu else ("float32", "bfloat16")
  folder = jax_settings.cache_dir() / "peaks"
  write_result(peak_flops_per_s={dtype: best_peak(dtype, folder) for dtype in dtypes})


def write_result(**found: Any) -> None:
  """Prints a line of JSON."""
  print(json.dumps(found), flush=True)


def described(device: jax.Device) -> dict[str, Any]:
  """Returns what a device is, and its memory in bytes where it tells."""
  memory = (device.memory_stats() or {}) if hasattr(device, "memory_stats") else {}
  limit = memory.get("bytes_limit")
  return {"platform": device.platform, "kind": device.device_kind, "memory_bytes": limit}


def train_and_restore(folder: pathlib.Path) -> dict[str, Any]:
  """Trains three steps, then goes on from the checkpoint, which has nothing left to do.

  Returns:
    `losses`, and `equal`: whether the digest of the state that was restored is that of the state
    that was saved.
  """
  experiment = load_recipe("tiny", [f"--config.{change}" for change in CHANGES])
  corpus = open_corpus(experiment.data, None)
  for _ in range(2):
    workdir = Workdir(folder / "run")
    Trainer(experiment, workdir, corpus, one_device()).fit()
    workdir.release()
  done = [event for event in read_lines(workdir.events) if event["event"] == "done"]
  digests = [event["digest"] for event in done]
  losses = [line["loss"] for line in read_lines(workdir.metrics)]
  return {"losses": losses, "equal": len(digests) == 2 and len(set(digests)) == 1}


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
