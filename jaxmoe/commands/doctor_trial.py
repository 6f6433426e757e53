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
from jaxmoe.cost.peak import best_peak
from jaxmoe.doctor.trial_run import described, train_and_restore


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


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
