"""The gradient half and the update half of a step, run apart, do what the one program does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.data.batches import NAMES
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.sharded_gradients import context_of
from jaxmoe.train.step import abstract_batch, abstract_state, build_train_step, lower_step
from jaxmoe.train.train_state import StateSpec

OVERRIDES = (
  "model.stack.0.repeats=1", "data.seq_len=16", "train.batch_size=4", "train.num_micro=2",
  "train.recovery.spike_window=2",
)  # fmt: skip


def batches(layout, experiment, count):
  rng = np.random.default_rng(0)
  shape = (experiment.train.batch_size, experiment.data.seq_len)
  for _ in range(count):
    batch = {name: np.ones(shape, np.int32) for name in NAMES}
    batch["ids"], batch["labels"] = (rng.integers(0, 99, shape, np.int32) for _ in range(2))
    batch["position"] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    yield layout.put_batch(batch)


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(data=2)])
def test_two_programs_do_what_the_one_does(parallel):
  overrides = [f"--config.{change}" for change in OVERRIDES]
  overrides += [f"--config.parallel.data={parallel.data}"]
  experiment = load_recipe("configs/tiny.py:router=threshold", overrides)
  decoder, layout = experiment.decoder(), make_layout(parallel, jax.devices()[: parallel.data])
  spec = StateSpec(decoder, experiment.transform(decoder), layout, 2, experiment.masters(decoder))
  given = abstract_state(spec), abstract_batch(experiment, layout)
  whole = lower_step(experiment, decoder, spec, layout, *given).compile()
  step = build_train_step(experiment, decoder, context_of(decoder, parallel, layout))
  gradients = jax.jit(step.gradients)
  shardings = (spec.shardings, layout.replicated)
  apply = jax.jit(step.apply, donate_argnums=0, out_shardings=shardings)
  state = spec.init(3)
  for batch in batches(layout, experiment, 3):
    before = jax.tree.map(jnp.copy, state)
    state, right = whole(state, batch)
    close(apply(before, *gradients(before, batch)), (state, right))
  assert int(state.step) == 3 and int(state.skipped) == 0


def close(found, right):
  """Within 1e-6 of a leaf's largest number: what is fused in one program rounds once less."""
  assert jax.tree.structure(found) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right)):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max(initial=0))
