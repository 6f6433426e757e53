"""The first state and the step of a recipe on eight devices: kept, they give the same bits."""

import jax
import numpy as np
import pytest

from jaxmoe.core.kept_programs import Compiler, KeptPrograms, Program
from jaxmoe.parallel import make_layout
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.step import abstract_batch, abstract_state, step_program
from jaxmoe.train.train_state import StateSpec

LATER_S = 4e9
CHANGES = ("train.batch_size=8", "parallel.data=8", "parallel.zero=3", "data.seq_len=16")


@pytest.fixture(scope="module")
def stepped():
  """Returns a function that gives the leaves before and after a step, with a maker of programs."""
  experiment = load_recipe("configs/tiny.py", [f"--config.{change}" for change in CHANGES])
  layout, decoder = make_layout(experiment.parallel), experiment.decoder()
  transform, masters = experiment.transform(decoder), experiment.masters(decoder)

  def run(compiler):
    spec = StateSpec(decoder, transform, layout, masters=masters, compiled=compiler)
    like = abstract_batch(experiment, layout)
    program = step_program(experiment, decoder, spec, layout)
    step = compiler(program, abstract_state(spec), like)
    ids = np.arange(like["labels"].size, dtype=np.int32).reshape(like["labels"].shape) % 17
    places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    ones = np.ones_like(ids)
    rows = {"ids": ids, "labels": ids, "position": places, "segment": ones, "domain": ones * 0}
    batch = layout.put_batch(rows)
    state = spec.init(5)
    before = jax.tree.map(np.array, state)
    return jax.tree.map(np.array, (before, step(state, batch)))

  return run, (experiment, masters)


def test_kept_programs_of_a_recipe_on_eight_devices_give_the_bits_of_unkept_ones(
  stepped, tmp_path, monkeypatch
):
  run, about = stepped
  unkept = run(Compiler())
  first = run(KeptPrograms(tmp_path, LATER_S).of(*about))
  assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {
    "first_state", "optimizer", "step"
  }  # fmt: skip

  def traced(program, *args):
    raise AssertionError(f"{program.name} is traced")

  monkeypatch.setattr(Program, "lower", traced)
  second = run(KeptPrograms(tmp_path, LATER_S).of(*about))
  for found in (first, second):
    assert jax.tree.structure(found) == jax.tree.structure(unkept)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(unkept)):
      assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs, equal_nan=True)
  before, (after, _) = unkept
  moved = [
    not np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params))
  ]
  assert all(moved)
