"""Devices for which a run has nothing to do."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxmoe.core.layout import Layout
from jaxmoe.parallel import idle_line
from jaxmoe.train.experiment import Experiment


def idle_devices(
  experiment: Experiment, layout: Layout, devices: Sequence[jax.Device]
) -> str | None:
  """Returns a line on devices for which a run has nothing to do, None if there are none."""
  rows = experiment.train.batch_size // experiment.train.num_micro
  return idle_line(experiment.parallel, layout.mesh, devices, rows)
