"""What events say of saved steps, and a folder of checkpoints that is not there any more."""

import json
import shutil

import pytest

from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.train.saved_steps import check_saved, last_saved

PROCESS, START, SURGERY = ({"event": kind} for kind in ("process", "start", "surgery"))


def at(kind, step):
  return {"event": kind, "step": step}


HISTORIES = {
  "nothing": ([], [], None),
  "killed before its first save": ([PROCESS, START], [], None),
  "killed in its first save": ([START, at("checkpoint", 4)], ["4.orbax-checkpoint-tmp"], None),
  "killed in it again": (
    [START, at("checkpoint", 4), PROCESS, START, at("checkpoint", 4)],
    ["4.orbax-checkpoint-tmp-17"], None,
  ),
  "killed after it": ([START, at("checkpoint", 4)], [], 4),
  "killed in its second save": (
    [START, at("checkpoint", 4), at("checkpoint", 8)], ["8.orbax-checkpoint-tmp"], 4
  ),
  "first save failed": ([START, at("checkpoint", 4), at("save_failed", 4)], [], None),
  "first save could not begin": ([START, at("save_failed", 4)], [], None),
  "second save could not begin": ([START, at("checkpoint", 4), at("save_failed", 8)], [], 4),
  "all saves failed": (
    [START, at("checkpoint", 4), at("save_failed", 4), at("save_failed", 8), at("failed", 8)],
    [], None,
  ),
  "failed, then started anew": (
    [START, at("checkpoint", 4), PROCESS, START, at("save_failed", 6)], [], None
  ),
  "done": ([START, at("checkpoint", 6), at("done", 6)], [], 6),
  "stopped": ([START, at("checkpoint", 3), at("stopped", 3)], [], 3),
  "gone on": ([START, at("checkpoint", 4), at("resume", 4), at("checkpoint", 8)],
              ["8.orbax-checkpoint-tmp"], 4),
  "done, and started anew by older code": (
    [START, at("checkpoint", 6), at("done", 6), PROCESS, START], [], 6
  ),
  "went back to a step": (
    [at("checkpoint", 4), at("checkpoint", 8), {"event": "rollback", "to": 4}], ["8.undone"], 4
  ),
  "went back to its start": (
    [START, at("checkpoint", 4), {"event": "rollback", "to": 0}], ["4.undone"], None
  ),
  "killed while it went back": ([START, at("checkpoint", 4)], ["4.undone"], None),
  "made by surgery": ([SURGERY], [], 0),
  "made by surgery, killed in its first save": (
    [SURGERY, START, at("checkpoint", 4)], ["4.orbax-checkpoint-tmp"], 0
  ),
  "converted, and its moves undone": ([{"event": "convert"}, at("checkpoint", 4)], ["4.undone"], 0),
}  # fmt: skip


@pytest.mark.parametrize("what", HISTORIES)
def test_the_last_saved_step_is_known_from_events(what):
  events, names, expected = HISTORIES[what]
  assert last_saved(iter(events), names) == expected


@pytest.fixture
def run(tmp_path):
  """Returns a folder whose events say that step 6 was saved."""
  events = [START, at("checkpoint", 6), at("done", 6)]
  (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
  (tmp_path / "checkpoints" / "6").mkdir(parents=True)
  return tmp_path


def test_checkpoints_that_are_gone_are_no_new_run(run):
  def look():
    check_saved(run / "checkpoints", run / "events.jsonl")

  look()
  for name in ("6.damaged", "6.damaged.2"):
    (run / "checkpoints" / "6").rename(run / "checkpoints" / name)
    look()
    (run / "checkpoints" / name).rename(run / "checkpoints" / "6")
  (run / "checkpoints" / "6").rmdir()
  with pytest.raises(CheckpointError, match=r"step 6 was saved, says .* no step is there"):
    look()
  (run / "checkpoints").rmdir()
  with pytest.raises(CheckpointError, match="is a disk not mounted"):
    look()
  (run / "checkpoints").symlink_to("/mnt/scratch/not/there")
  with pytest.raises(CheckpointError, match="link to /mnt/scratch/not/there"):
    look()


def test_a_new_run_cannot_save_through_a_dead_link_or_into_a_file(tmp_path):
  for make in (lambda path: path.symlink_to("nowhere"), lambda path: path.touch()):
    make(tmp_path / "checkpoints")
    with pytest.raises(InputError, match="checkpoints: is no folder"):
      check_saved(tmp_path / "checkpoints", tmp_path / "events.jsonl")
    (tmp_path / "checkpoints").unlink()
  shutil.copytree(tmp_path, tmp_path / "checkpoints")
  check_saved(tmp_path / "checkpoints", tmp_path / "events.jsonl")
