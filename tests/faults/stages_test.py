"""A run over stages of a pipeline, killed, goes on as if nothing had happened, or over others."""

import json

import numpy as np
import pytest

from tests.faults.conftest import Case

STAGES = {"parallel.pipe": 2, "parallel.pipeline": "zb_h1", "parallel.expert": 2}
STEP = {"train.num_micro": 4, "train.batch_size": 8}
PHASES = ("compile", "step", "save", "evaluation", "samples")


@pytest.fixture(scope="module")
def over_stages(undisturbed_by):
  return undisturbed_by(changes={**STEP, **STAGES})


@pytest.fixture
def staged(zygote, tmp_path, record_property, over_stages):
  return Case(zygote, tmp_path, over_stages, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_over_stages_killed_anywhere_ends_up_undisturbed(staged, phase):
  staged.begin(f"sigkill_of_stages_in_{phase}", 0)
  staged.hit(phase, changes={**STEP, **STAGES})
  staged.recover(changes={**STEP, **STAGES})


@pytest.mark.slow
@pytest.mark.parametrize("degrees", ({}, {"parallel.fsdp": 2}, {"parallel.context": 2}), ids=str)
def test_a_run_over_stages_that_was_killed_goes_on_over_other_devices(
  staged, over_stages, degrees
):
  staged.begin("sigkill_of_stages_then_others", 0)
  staged.hit("save", changes={**STEP, **STAGES})
  ended = staged.run(changes={**STEP, **degrees})
  assert ended.code == 0, ended
  staged.recovered()

  def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])

  np.testing.assert_allclose(losses(staged.workdir), losses(over_stages), rtol=1e-5)
