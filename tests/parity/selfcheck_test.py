"""The first step of a run is compared with one device, and a wrong layout is refused."""

import jax
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys
from jaxmoe.parallel import MeshWays, make_layout
from jaxmoe.parity import selfcheck
from jaxmoe.parity.fixture import batch_of
from launch.recipes import load_recipe


def given(*degrees):
  changes = [*(f"parallel.{degree}" for degree in degrees), "train.batch_size=8"]
  experiment = load_recipe("configs/tiny.py", [f"--config.{change}" for change in changes])
  layout, decoder = make_layout(experiment.parallel), experiment.decoder()
  shardings = layout.shardings("params", decoder.dims, decoder.shapes)
  params = jax.device_put(decoder.init(Keys.from_seed(0)), shardings)
  return experiment, layout, params, layout.put_batch(batch_of())


def test_a_layout_is_found_equal_and_a_lost_sum_is_refused(monkeypatch):
  args = given("tensor=2", "expert=2")
  assert "on 4 devices equal those of one" in selfcheck(*args)
  monkeypatch.setattr(MeshWays, "leave", lambda self, y_BLD: y_BLD)
  with pytest.raises(InputError, match="differ from those of one"):
    selfcheck(*args)
