"""The state of Adam in a checkpoint of a training run of torch, as that of a run of ours."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmoe.checkpoint import LazyArray
from jaxmoe.checkpoint.deepspeed_zero import MOMENTS
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import one_device
from jaxmoe.models.pretrained.checkpoint import Checkpoint
from jaxmoe.models.pretrained.checkpoint_files import Moments
from jaxmoe.optim import AdamW
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.train_state import PARAMS, StateSpec

_OURS = re.compile(r"optimizer/(?:.*?/)?(mu|nu)/(.+)")
_WITHOUT = "--weights_only begins at step 0 without moments"
LEFT = (
  "not carried over: the learning rate and its schedule, which parameters do not decay, random "
  "numbers, and the place in the data; give them with --config"
)
"""What of a run of torch has no place in one of ours."""


def step_of(moments: Moments) -> int:
  """Returns the step that a run with these moments is at."""
  return moments.count + moments.skipped


def adam_of(moments: Moments, default: AdamW) -> AdamW:
  """Returns the optimizer that goes on with moments; `default` for what is not said of it.

  Raises:
    InputError: groups of parameters have different rates of averaging.
  """
  if not moments.settings:
    return default
  said = {(group.get("betas"), group.get("eps")) for group in moments.settings}
  if len(said) != 1:
    raise InputError(f"groups of parameters have betas and eps of {sorted(said)}; {_WITHOUT}")
  (betas, eps) = said.pop()
  decay = max(float(group.get("weight_decay") or 0) for group in moments.settings)
  b1, b2 = betas or (default.b1, default.b2)
  return AdamW(b1, b2, default.eps if eps is None else eps, decay)


def state_arrays(
  checkpoint: Checkpoint, moments: Moments, experiment: Experiment
) -> dict[str, LazyArray]:
  """Returns all of a state but its parameters, by canonical name; moments are read when asked for.

  Args:
    checkpoint: With the parameters; a moment lies as its parameter does.
    moments: Of it, float32.
    experiment: The run that goes on with them.

  Raises:
    InputError: the run keeps other numbers than Adam does, or ends before their step.
  """
  if not isinstance(experiment.optim.optimizer, AdamW):
    raise InputError(f"the moments are Adam's, and optim.optimizer is another; {_WITHOUT}")
  step = step_of(moments)
  if step >= experiment.train.num_steps:
    raise InputError(
      f"the checkpoint is at step {step}, and train.num_steps={experiment.train.num_steps}; give "
      f"--config.train.num_steps above it ({_WITHOUT})"
    )
  decoder = experiment.decoder()
  window = experiment.train.recovery.spike_window
  like = StateSpec(
    decoder, experiment.transform(decoder), one_device(), window, experiment.masters(decoder)
  ).abstract()
  weights = {bound.name: (bound, layout) for bound, layout in checkpoint.weights}
  arrays = {}
  for name, leaf in like.items():
    if name.startswith(PARAMS):
      continue
    if found := _OURS.fullmatch(name):
      bound, layout = weights[found[2]]
      bound = dataclasses.replace(bound, dtype=np.dtype(leaf.dtype))
      moment = MOMENTS[found[1] == "nu"]
      read = functools.partial(moments.read, moment)
      make = functools.partial(bound.gather, layout, read)
    else:
      make = functools.partial(np.full, leaf.shape, _count(name, moments), leaf.dtype)
    arrays[name] = LazyArray(leaf.shape, np.dtype(leaf.dtype), make)
  return arrays


def _count(name: str, moments: Moments) -> int:
  """Returns a counter of the state."""
  counts: Mapping[str, Any] = {"step": step_of(moments), "skipped": moments.skipped}
  is_adams = name.startswith("optimizer/") and name.endswith("/count")
  return moments.count if is_adams else counts.get(name, 0)
