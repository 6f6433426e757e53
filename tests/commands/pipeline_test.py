"""A run over stages: the losses of one device, and a run that goes on with other stages or none."""

import json

import numpy as np
import pytest

from jaxmoe.parallel.pipelines import PIPELINES, write_table
from tests.commands.conftest import CHANGES, TINY

STAGES = ("parallel.pipe=2", "parallel.pipeline=zb_h1")


def losses(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return np.array([line["loss"] for line in lines])


@pytest.mark.slow
def test_a_run_keeps_the_table_of_a_file(here, tmp_path):
  file, workdir = tmp_path / "own.csv", tmp_path / "run"
  file.write_text(write_table(PIPELINES["1f1b"](2, 4)))

  def train(steps, config=TINY, *changes):
    said = [f"train.num_steps={steps}", "train.num_micro=4", *CHANGES[1:], *changes]
    flags = [f"--config.{change}" for change in said]
    return here("train", config, *flags, f"--workdir={workdir}", "--allow_unproven")

  table = ("parallel.pipe=2", f"parallel.pipeline={file}")
  assert train(6, TINY, *table).code == 0
  ends = "optim.schedule.earlier_ends=6"
  file.write_text(write_table(PIPELINES["gpipe"](2, 4)))
  edited = train(7, TINY, *table, ends)
  assert edited.code == 0 and "goes by another table than the run had" in edited.out
  file.unlink()
  moved = train(8, TINY, *table, f"{ends},7")
  assert moved.code == 2 and "config.json of a run has its table" in moved.err
  kept = train(8, f"--config={workdir / 'config.json'}", f"{ends},7")
  assert kept.code == 0 and "another table" not in kept.out
  assert len(losses(workdir)) == 8


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
