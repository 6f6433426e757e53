import dataclasses
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from jaxmoe.core.config_io import override, to_json
from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.workdir import Workdir

TINY = load_recipe("configs/tiny.py", [])
OWNER = """
import fcntl, sys, time
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
time.sleep(60)
"""


def content(path):
  """Returns every path below `path` with its bytes and the time it was last changed."""
  return {
    str(each): (each.stat().st_mtime_ns, each.read_bytes() if each.is_file() else None)
    for each in sorted(pathlib.Path(path).rglob("*"))
  }


@pytest.fixture
def at():
  """Returns a function from a path to a workdir that holds no lock when the test is over."""
  made = []

  def make(path):
    made.append(Workdir(path))
    return made[-1]

  yield make
  for workdir in made:
    workdir.release()


@pytest.fixture
def claimed(tmp_path):
  """A folder with a run in it that nobody holds any more."""
  workdir = Workdir(tmp_path / "run")
  workdir.claim(TINY)
  workdir.release()
  return workdir.path


@pytest.fixture
def owner(claimed):
  """Another process that holds the folder."""
  process = subprocess.Popen(
    [sys.executable, "-S", "-c", OWNER, str(claimed / "lock")], stdout=subprocess.PIPE
  )
  with process:
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()


def test_making_and_checking_a_workdir_writes_nothing(at, tmp_path):
  at(tmp_path / "a" / "b").check(TINY)
  assert list(tmp_path.iterdir()) == []


def test_checking_an_existing_run_changes_no_file(at, claimed):
  before = content(claimed)
  at(claimed).check(TINY)
  assert content(claimed) == before


def test_a_claimed_folder_gives_its_recipe_back(at, claimed):
  assert at(claimed).experiment() == TINY
  assert (claimed / "config.json").read_text() == to_json(TINY)


def test_a_folder_held_by_another_process_is_refused(at, claimed, owner):
  before = content(claimed)
  for action in ("check", "claim"):
    with pytest.raises(InputError, match="in use by another run"):
      getattr(at(claimed), action)(TINY)
  assert content(claimed) == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owner_does_not_block(at, claimed, owner, how):
  owner.send_signal(how)
  owner.wait()
  workdir = at(claimed)
  workdir.check(TINY)
  workdir.claim(TINY)


def test_the_lock_is_free_once_it_is_released_and_held_until_then(at, claimed):
  first, second = at(claimed), at(claimed)
  first.claim(TINY)
  with pytest.raises(InputError, match="in use by another run"):
    second.claim(TINY)
  first.release()
  second.claim(TINY)


def test_the_owner_itself_may_check_and_claim_again(at, claimed):
  workdir = at(claimed)
  workdir.check(TINY)
  workdir.claim(TINY)
  workdir.check(TINY)


def test_another_config_is_refused_with_the_difference_and_changes_nothing(at, claimed):
  other = override(TINY, [("model.dim", "48"), ("train.seed", "3"), ("train.num_steps", "99")])
  before, workdir = content(claimed), at(claimed)
  for action in ("check", "claim"):
    with pytest.raises(InputError) as caught:
      getattr(workdir, action)(other)
    message = str(caught.value)
    assert "model.dim: 32 -> 48" in message
    assert "train.seed: 0 -> 3" in message
    assert "num_steps" not in message, "a field that may change"
  assert content(claimed) == before


SAFE = (
  ("train.num_steps", "99"),
  ("train.max_skips", "0"),
  ("train.checkpoint_every", "3"),
  ("train.keep", "1"),
  ("train.log_every", "7"),
  ("train.stall_s", "60"),
  ("train.recovery.max_rollbacks", "0"),
  ("evaluation.every", "4"),
  ("evaluation.max_bytes", "100"),
  ("samples.prompts", "a,b,c"),
  ("samples.prompts", ""),
  ("samples.temperature", "0"),
)


@pytest.mark.parametrize("change", SAFE, ids=lambda change: f"{change[0]}={change[1]}")
def test_a_field_that_is_safe_to_change_may_change_and_is_written(at, claimed, change):
  other = override(TINY, [change])
  workdir = at(claimed)
  workdir.claim(other)
  assert workdir.experiment() == TINY, "a run that is refused later must not have changed it"
  workdir.write_config(other)
  assert workdir.experiment() == other


UNSAFE = (
  "train.batch_size", "train.num_micro", "train.seed", "data.seq_len", "optim.learning_rate"
)  # fmt: skip


@pytest.mark.parametrize("field", UNSAFE)
def test_a_field_that_numbers_depend_on_may_not_change(at, claimed, field):
  with pytest.raises(InputError, match=field):
    at(claimed).check(override(TINY, [(field, "2")]))


def test_every_field_of_training_is_either_safe_or_not_on_purpose():
  """A new field must be put on one side."""
  fields = {field.name for field in dataclasses.fields(TINY.train)}
  safe = {name.split(".")[1] for name, _ in SAFE if name.startswith("train.")}
  assert fields - safe == {"batch_size", "num_micro", "seed", "store"}  # of recovery a part


BEFOREHAND = (
  ".gitkeep", ".hydra/config.yaml", "lost+found/", "slurm-17.out", "run-17.err", "train.log",
  "nohup.out", "stdout", "stderr.txt", "logs/0.txt", "log/", "profile/plugins/x", "checkpoints/",
  "lock", "checkpoints/.gitkeep", "tensorboard/",
)  # fmt: skip


@pytest.mark.parametrize("name", BEFOREHAND)
def test_a_folder_that_a_launcher_made_is_a_workdir(at, tmp_path, name):
  put(tmp_path, name)
  at(tmp_path).claim(TINY)
  assert at(tmp_path).experiment() == TINY


STRANGERS = (
  "metrics.jsonl", "report.html", "tokenizer.json", "notes.txt", "train.py", "src/main.py",
  "checkpoints/last.pt",
)  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_a_folder_with_files_of_its_own_is_refused_and_stays(at, tmp_path, name):
  put(tmp_path, name)
  before = content(tmp_path)
  for action in ("check", "claim"):
    with pytest.raises(InputError, match=rf"nor a run \(it holds {name.split('/')[0]}\)"):
      getattr(at(tmp_path), action)(TINY)
  assert content(tmp_path) == before
  with pytest.raises(InputError, match="neither empty nor a run"):
    at("/").check(TINY)


def put(folder, name):
  path = folder / name
  path.parent.mkdir(exist_ok=True, parents=True)
  if name.endswith("/"):
    path.mkdir()
  else:
    path.write_text("text\n")


OF_A_RUN = {
  "events.jsonl": '{"event": "process", "time": {"unix_s": 1.0}}\n',
  "metrics.jsonl": '{"step": 1, "loss": 2.0, "time": {"seconds": {"step": 1.0}}}\n',
  "checkpoints/4/label/metadata": "{}",
}


@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_run_that_lost_its_config_is_a_run(at, tmp_path, name):
  put(tmp_path, "samples.md")
  put(tmp_path, name)
  (tmp_path / name).write_text(OF_A_RUN[name])
  at(tmp_path).check(TINY)


def test_a_run_among_the_checkpoints_of_another_is_refused(at, claimed):
  (claimed / "checkpoints").mkdir()
  with pytest.raises(InputError, match="lies among the checkpoints of the run in"):
    at(claimed / "checkpoints" / "9").check(TINY)
  at(claimed / "other").check(TINY)


def test_no_run_and_a_damaged_config_are_told_apart(at, tmp_path):
  with pytest.raises(CheckpointError, match="no run here"):
    at(tmp_path).experiment()
  (tmp_path / "config.json").write_text('{"data":')
  with pytest.raises(InputError, match=r"config\.json"):
    at(tmp_path).experiment()


@pytest.mark.parametrize("action", ["check", "claim"])
def test_a_path_that_is_or_leads_through_a_file_is_refused(at, tmp_path, action):
  (tmp_path / "file").write_text("x")
  for path in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(InputError, match="--workdir"):
      getattr(at(path), action)(TINY)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_written_is_refused(at, tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(InputError, match="cannot write"):
    at(tmp_path / "run").check(TINY)
  tmp_path.chmod(0o700)

