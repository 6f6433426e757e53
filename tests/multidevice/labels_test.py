"""One label on any device and in any microbatch makes a step; none on all of them makes none."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.step import abstract_batch, abstract_state, lower_step
from jaxmoe.train.train_state import StateSpec

DENSE = (
  LayerGroup(
    (BlockConfig(SoftmaxAttention(num_heads=2, num_kv_heads=2, head_dim=4), MLPConfig(mlp_dim=8)),),
    1,
  ),
)
TINY = load_recipe("configs/tiny.py", []).model.stack
LAYOUTS = [
  (Parallel(fsdp=2), DENSE),
  pytest.param((Parallel(data=2, expert=2), TINY), marks=pytest.mark.slow),
  pytest.param((Parallel(data=2, fsdp=2, tensor=2), TINY), marks=pytest.mark.slow),
  pytest.param((Parallel(expert=2, tensor=2), TINY), marks=pytest.mark.slow),
]
ROWS, LENGTH = 8, 8
CHANGES = {"data.seq_len": LENGTH, "train.batch_size": ROWS, "train.num_micro": 2, "model.dim": 16}


def step_of(parallel, stack):
  """Returns the compiled step of two microbatches, its layout and a fresh state."""
  made = load_recipe("configs/tiny.py", [f"--config.{k}={value}" for k, value in CHANGES.items()])
  model = dataclasses.replace(made.model, stack=stack)
  made = dataclasses.replace(made, parallel=parallel, model=model)
  decoder, layout = made.decoder(), make_layout(parallel)
  spec = StateSpec(decoder, made.transform(decoder), layout, made.train.recovery.spike_window)
  given = abstract_state(spec), abstract_batch(made, layout)
  return lower_step(made, decoder, spec, layout, *given).compile(), layout, spec.init(0)


@pytest.mark.parametrize("spread", LAYOUTS)
def test_labels_are_counted_over_all_devices_and_microbatches(spread):
  step, layout, state = step_of(*spread)
  rng = np.random.default_rng(0)
  batch = {name: np.ones((ROWS, LENGTH), np.int32) for name in ("segment", "domain")}
  batch["ids"] = rng.integers(0, 200, (ROWS, LENGTH), np.int32)
  batch["position"] = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
  none, made = 0, 0
  for row in (None, *range(ROWS), None):
    labels = np.full((ROWS, LENGTH), -1, np.int32)
    if row is not None:
      labels[row, row] = 7
    before = np.array(state.params["embed"]["table"])
    state, metrics = step(state, layout.put_batch({**batch, "labels": labels}))
    none, made = none + (row is None), made + (row is not None)
    assert (int(metrics["unlabelled"]), int(metrics["skipped"])) == (none, 0)
    assert int(state.recent.count) == made
    moved = np.any(np.array(state.params["embed"]["table"]) != before)
    assert moved == (row is not None)
