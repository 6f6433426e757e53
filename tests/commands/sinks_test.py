"""Where metrics go besides the workdir, and that nothing that happens there reaches the run."""

import errno
import functools
import json
import shutil
import struct
import threading

import jax
import pytest

from jaxmoe.sinks import SINKS
from jaxmoe.train.sinks import Sinks, flatten
from tests.sinks.event_files import read_back


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def outside_time(path):
  return [{k: v for k, v in line.items() if k != "time"} for line in lines_of(path)]


def failures(workdir):
  return [e for e in lines_of(workdir / "events.jsonl") if e["event"] == "sink_failed"]


@pytest.mark.parametrize("flag", ["--sinks=nowhere", "--profile_steps=9:3", "--profile_steps=5:7"])
def test_a_wrong_flag_ends_with_one_line_before_anything_is_written(here, again, tmp_path, flag):
  result = here("train", *again, f"--workdir={tmp_path}/run", flag)
  assert result.code == 2, result
  (line,) = result.err.splitlines()
  assert line.startswith(f"error: {flag.split('=')[0]}")
  assert not (tmp_path / "run").exists()


class Bad:
  """A sink that raises an error, or hangs, at every line."""

  name = "bad"

  def __init__(self, error, workdir, env):
    self.error = error

  def resume(self, step):
    pass

  def write(self, line):
    if self.error is None:
      threading.Event().wait()
    raise self.error

  def close(self):
    pass


@pytest.mark.parametrize(
  "error, why",
  [
    (RuntimeError("no route to host"), "switched off: RuntimeError: no route to host"),
    (OSError(errno.ENOSPC, "No space left on device"), "switched off: OSError: [Errno 28]"),
    (None, "did not finish within 0.2 s; 5 lines were left"),
  ],
  ids=["raises", "fills the disk", "hangs"],
)
def test_a_bad_sink_leaves_a_run_and_its_metrics_untouched(
  here, again, trained, tmp_path, monkeypatch, error, why
):
  monkeypatch.setitem(SINKS, "bad", functools.partial(Bad, error))
  monkeypatch.setattr(Sinks, "close", lambda self, wait_s, close=Sinks.close: close(self, 0.2))
  result = here("train", *again, f"--workdir={tmp_path}/run", "--sinks=bad")
  assert result.code == 0, result
  assert outside_time(tmp_path / "run/metrics.jsonl") == outside_time(trained / "metrics.jsonl")
  (event,) = failures(tmp_path / "run")
  assert event["sink"] == "bad" and event["why"].startswith(why)
  told = [line for line in result.out.splitlines() if line.startswith("sink bad: ")]
  assert told == [f"sink bad: {event['why']}; the run itself is not touched"]


def written(path):
  """Returns {tag: {step: value}} of metrics.jsonl, in TensorBoard's float32."""
  expected = {}
  for line in lines_of(path):
    for tag, value in flatten(line)[0].items():
      expected.setdefault(tag, {})[line["step"]] = struct.unpack("f", struct.pack("f", value))[0]
  return expected


def test_tensorboard_reads_what_metrics_jsonl_says_over_a_resume(here, again, tmp_path):
  pytest.importorskip("tensorboardX")
  run = tmp_path / "run"
  command = (*again, f"--workdir={run}", "--sinks=tensorboard")
  assert here("train", *command).code == 0
  points, _ = read_back(run / "tensorboard")
  assert points == written(run / "metrics.jsonl")
  assert {"loss", "layers/1/load/3", "eval/domains/copy", "time/seconds/step"} <= points.keys()
  shutil.rmtree(run / "checkpoints" / "6")  # steps 5 and 6 are made, and written, again
  assert here("train", *command).code == 0
  points, _ = read_back(run / "tensorboard")
  assert points == written(run / "metrics.jsonl")
  assert set(points["loss"]) == {1, 2, 3, 4, 5, 6}
  assert failures(run) == []


@pytest.mark.slow
def test_wandb_offline_gets_a_run_of_its_own_quietly_and_keeps_its_id(
  alone, again, trained, tmp_path
):
  pytest.importorskip("wandb")
  run, home = tmp_path / "run", {"HOME": str(tmp_path), "WANDB_MODE": "offline"}
  command = ("train", *again, f"--workdir={run}", "--sinks=wandb")
  first = alone(*command, env=home)
  assert (first.code, first.err) == (0, "")
  assert "wandb:" not in first.out
  assert outside_time(run / "metrics.jsonl") == outside_time(trained / "metrics.jsonl")
  identity = (run / "wandb" / "run_id").read_text().strip()
  (log,) = (run / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb")
  content = log.read_bytes()
  for tag in (b"loss", b"load_entropy", b"tokens_per_s", b"bits_per_byte"):
    assert tag in content
  shutil.rmtree(run / "checkpoints" / "6")
  second = alone(*command, env=home)
  assert (second.code, second.err) == (0, "")
  assert (run / "wandb" / "run_id").read_text().strip() == identity
  assert failures(run) == []


def test_a_run_writes_a_profile_of_the_steps_it_was_asked_for(
  here, again, trained, tmp_path, monkeypatch
):
  set_up = {}
  monkeypatch.setattr(jax.config, "update", set_up.__setitem__)
  run = tmp_path / "run"
  result = here("train", *again, f"--workdir={run}", "--profile_steps=3:4")
  assert result.code == 0, result
  # In the process of a command: a cached program would bring names of its own time.
  assert set_up["jax_compilation_cache_include_metadata_in_key"] is True
  assert f"profile of steps 3 to 4 in {run}/profile" in result.out
  (trace,) = (run / "profile").rglob("*.xplane.pb")
  assert b"train_step" in trace.read_bytes()
  assert outside_time(run / "metrics.jsonl") == outside_time(trained / "metrics.jsonl")
