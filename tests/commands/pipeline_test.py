"""A run over stages: the losses of one device, and a run that goes on with other stages or none."""

import json

import numpy as np
import pytest

from tests.commands.conftest import CHANGES, TINY

STAGES = ("parallel.pipe=2", "parallel.pipeline=zb_h1")


def losses(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return np.array([line["loss"] for line in lines])


@pytest.mark.slow
def test_stages_train_as_one_device_and_runs_move_between_them(here, tmp_path):
  def train(name, steps, *changes):
    ended = ("optim.schedule.earlier_ends=6",) if steps > 6 else ()
    said = (f"train.num_steps={steps}", "train.num_micro=4", *CHANGES[1:], *ended, *changes)
    flags = [f"--config.{change}" for change in said]
    result = here("train", TINY, *flags, f"--workdir={tmp_path / name}", "--allow_unproven")
    assert result.code == 0, result
    return losses(tmp_path / name)

  np.testing.assert_allclose(train("stages", 6, *STAGES), train("one", 6), rtol=1e-5)
  there, back = train("stages", 9), train("one", 9, STAGES[0], "parallel.pipeline=gpipe")
  np.testing.assert_allclose(there, back, rtol=1e-5)
  samples = [(tmp_path / name / "samples.md").read_text() for name in ("stages", "one")]
  assert samples[0] == samples[1]
