"""Every name that `configs/tiny.py` takes trains."""

import json

import numpy as np
import pytest

from jaxmoe.models.block import ATTENTION
from jaxmoe.moe.balance import BALANCE
from jaxmoe.moe.dispatch import DISPATCHERS
from jaxmoe.moe.experts import EXPERTS
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.optim import OPTIMIZERS
from tests.commands.conftest import TINY, run_here

NAMES = {
  "router": ROUTERS, "experts": EXPERTS, "balance": BALANCE, "dispatch": DISPATCHERS,
  "optimizer": OPTIMIZERS, "attention": ATTENTION,
}  # fmt: skip
PAIRS = [f"{keyword}={name}" for keyword, members in NAMES.items() for name in members]
MAY_RAISE = "dispatch=capacity_raise"  # A drop ends its run, and whether one comes is chance.


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_it_trains(pair, tmp_path):
  done = run_here(
    "train", f"{TINY}:{pair}", f"--workdir={tmp_path}/run", "--config.train.num_steps=12",
    "--config.train.checkpoint_every=12", "--config.evaluation.every=12",
    "--config.samples.every=12",
  )
  assert done.code in ((0, 5) if pair == MAY_RAISE else (0,)), done.err
  lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  losses = [json.loads(line)["loss"] for line in lines]
  assert np.isfinite(losses).all()
  if done.code == 0:
    assert len(losses) == 12 and np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1, losses
