"""The first step of a run is compared with one device, and a wrong layout is refused."""

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys
from jaxmoe.parallel import MeshContext, make_layout
from jaxmoe.parity import selfcheck
from jaxmoe.parity.fixture import batch_of
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.stage_program import StageShape


def given(*changes, recipe="configs/tiny.py"):
  changes = [*changes, "train.batch_size=8"]
  experiment = load_recipe(recipe, [f"--config.{change}" for change in changes])
  layout = make_layout(experiment.parallel)
  decoder = experiment.decoder(layout)
  shardings = layout.shardings("params", decoder.dims, decoder.shapes)
  params = jax.device_put(decoder.init(Keys.from_seed(0)), shardings)
  return experiment, layout, params, layout.put_batch(batch_of())


def test_a_layout_is_found_equal_and_a_lost_sum_is_refused_whatever_bfloat16_rounds(monkeypatch):
  """A recipe of bfloat16 is compared in float32, whose bound holds."""
  dtypes = ("model.dtype=bfloat16", "optim.master_dtype=bfloat16")
  *args, params, batch = given("parallel.tensor=2", "parallel.expert=2", *dtypes)
  args = *args, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), batch
  assert "on 4 devices equal those of one" in selfcheck(*args)
  monkeypatch.setattr(MeshContext, "reduce_tensor", lambda self, y_BLD: y_BLD)
  with pytest.raises(InputError, match="differ from those of one"):
    selfcheck(*args)


def test_what_is_drawn_or_dropped_on_a_device_is_no_difference():
  recipe = "configs/tiny.py:router=noisy,exchange=all_to_all_bounded"
  bound = "model.stack.0.pattern.0.ffn.exchange.bound=0.7"
  assert "on 4 devices equal" in selfcheck(
    *given("parallel.data=2", "parallel.expert=2", bound, recipe=recipe)
  )


STAGES = ("parallel.pipe=2", "train.num_micro=4", "model.stack.0.repeats=3")
ROWS = ("parallel.context=2", "parallel.attend=ring", "parallel.order=zigzag")


@pytest.mark.parametrize("changes", (
  STAGES,
  pytest.param((*STAGES, *ROWS, "parallel.head=one_barrier"), marks=pytest.mark.slow),
), ids=str)  # fmt: skip
def test_stages_and_parts_of_rows_are_compared_too(changes, monkeypatch):
  args = given(*changes)
  assert f"on {2 ** sum('=2' in change for change in changes)} devices equal" in selfcheck(*args)
  monkeypatch.setattr(StageShape, "put", lambda self, run, stack, found: stack)
  with pytest.raises(InputError, match="differ from those of one"):
    selfcheck(*args)
