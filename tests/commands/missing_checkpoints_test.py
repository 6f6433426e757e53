"""A run whose checkpoints are not where it saved them is refused, and stays as it was."""

import numpy as np
import pytest

COMMANDS = {
  "train": (),
  "evaluate": (),
  "generate": ("--prompt=a",),
  "score": ("--ids=FOLDER/ids.npy", "--out=FOLDER/scores.npz"),
  "surgery": ("--clone=2", "--out=FOLDER/new"),
  "convert": ("--to_hf=FOLDER/new",),
}


@pytest.fixture
def run(trained, tmp_path):
  """Returns a copy of the trained run on whose disk of checkpoints nobody can look."""
  workdir = tmp_path / "run"
  workdir.mkdir()
  for path in trained.iterdir():
    if path.is_file():
      (workdir / path.name).write_bytes(path.read_bytes())
  (workdir / "checkpoints").symlink_to("/mnt/scratch/not/there")
  np.save(tmp_path / "ids.npy", np.zeros((1, 4), np.int32))
  return workdir


def content(folder):
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_whose_checkpoints_are_gone_is_refused_and_stays(
  here, compiles, again, run, tmp_path, name
):
  flags = [flag.replace("FOLDER", str(tmp_path)) for flag in COMMANDS[name]]
  before, lowered = content(tmp_path), len(compiles)
  result = here(name, *(again if name == "train" else flags), f"--workdir={run}")
  assert result.code == 4, result
  assert len(result.err.splitlines()) == 1, result.err
  assert "step 6 was saved" in result.err and "link to /mnt/scratch/not/there" in result.err
  assert content(tmp_path) == before and compiles[lowered:] == []


def test_status_says_what_was_saved_and_is_not_there(here, run):
  result = here("status", f"--workdir={run}")
  assert result.code == 0, result
  said = " ".join(result.out.split())
  assert "no checkpoint yet" not in said
  assert "step 6 was saved, says events.jsonl, and no step is there" in said

