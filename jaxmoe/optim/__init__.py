"""Optimizers, schedules and the transform a step applies, all built from optax.

An optimizer gives a direction per parameter; clipping before it, weight decay and learning rate
after it are the same for all. What an optimizer does to a layer is the same however the layers lie
in memory: names and dims say what is one matrix, shapes never do.
"""

from jaxmoe.ops.guard import guarded
from jaxmoe.optim.fairness import OnlineFairness
from jaxmoe.optim.freeze import freeze, frozen_masks, hold
from jaxmoe.optim.masters import Masters, frozen_names
from jaxmoe.optim.optimizers import OPTIMIZERS, Adafactor, AdamW, Lion, Muon
from jaxmoe.optim.rounding import apply_updates
from jaxmoe.optim.schedules import SCHEDULES, Constant, Cosine, Wsd
from jaxmoe.optim.state_dims import state_dims
from jaxmoe.optim.transform import Optim, decay_mask, make_optimizer, make_schedule

__all__ = [
  "OPTIMIZERS",
  "SCHEDULES",
  "Adafactor",
  "AdamW",
  "Constant",
  "Cosine",
  "Lion",
  "Masters",
  "Muon",
  "OnlineFairness",
  "Optim",
  "Wsd",
  "apply_updates",
  "decay_mask",
  "freeze",
  "frozen_masks",
  "frozen_names",
  "guarded",
  "hold",
  "make_optimizer",
  "make_schedule",
  "state_dims",
]
