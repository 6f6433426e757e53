"""Where metrics go besides the workdir, and that nothing that happens there reaches the run."""

import errno
import functools
import json
import os
import re
import shutil
import struct
import sys
import threading

import jax
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.sinks import SINKS, make_sinks
from jaxmoe.train.sinks import Sinks, flatten


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def outside_time(path):
  return [{k: v for k, v in line.items() if k != "time"} for line in lines_of(path)]


def failures(workdir):
  return [e for e in lines_of(workdir / "events.jsonl") if e["event"] == "sink_failed"]


# Names.


def test_sinks_are_named_on_the_command_line(tmp_path):
  pytest.importorskip("tensorboardX")
  (sink,) = make_sinks(" tensorboard,", tmp_path, os.environ)
  assert sink.name == "tensorboard"
  assert make_sinks("", tmp_path, os.environ) == ()
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "names, words",
  [("tensorbord", "did you mean 'tensorboard'"), ("tensorboard,tensorboard", "given twice")],
)
def test_a_wrong_name_is_refused(tmp_path, names, words):
  with pytest.raises(InputError, match=re.escape(words)):
    make_sinks(names, tmp_path, os.environ)


@pytest.mark.parametrize(
  "name, package, extra", [("tensorboard", "tensorboardX", "tb"), ("wandb", "wandb", "wandb")]
)
def test_a_missing_package_is_refused_with_the_name_of_the_extra(
  monkeypatch, tmp_path, name, package, extra
):
  for module in [m for m in sys.modules if m.split(".")[0] == package]:
    monkeypatch.delitem(sys.modules, module)
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(InputError, match=re.escape(f"pip install 'jaxmoe[{extra}]'")):
    make_sinks(name, tmp_path, os.environ)


@pytest.mark.parametrize("flag", ["--sinks=nowhere", "--profile_steps=9:3", "--profile_steps=5:7"])
def test_a_wrong_flag_ends_with_one_line_before_anything_is_written(here, again, tmp_path, flag):
  result = here("train", *again, f"--workdir={tmp_path}/run", flag)
  assert result.code == 2, result
  (line,) = result.err.splitlines()
  assert line.startswith(f"error: {flag.split('=')[0]}")
  assert not (tmp_path / "run").exists()


def test_nobody_logged_in_to_wandb_is_told_before_anything_starts(monkeypatch, tmp_path):
  class Nobody:
    @staticmethod
    def login(prompt):
      return prompt

  monkeypatch.setitem(sys.modules, "wandb", Nobody)
  monkeypatch.delenv("WANDB_MODE", raising=False)
  with pytest.raises(InputError, match="WANDB_MODE=offline"):
    make_sinks("wandb", tmp_path, os.environ)
  monkeypatch.setenv("WANDB_MODE", "offline")
  assert make_sinks("wandb", tmp_path, os.environ)[0].name == "wandb"


# Sinks that fail.


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


# TensorBoard.


def read_back(folder):
  """Returns {tag: {step: value}} and {tag: {step: histogram}} as TensorBoard reads a folder."""
  module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  everything = {module.SCALARS: 0, module.HISTOGRAMS: 0}
  seen = module.EventAccumulator(str(folder), size_guidance=everything)
  seen.Reload()
  points = {
    tag: [(point.step, point.value) for point in seen.Scalars(tag)]
    for tag in seen.Tags()["scalars"]
  }
  for tag, values in points.items():
    assert len(dict(values)) == len(values), f"{tag} has a step twice"
  histograms = {
    tag: {point.step: point.histogram_value for point in seen.Histograms(tag)}
    for tag in seen.Tags()["histograms"]
  }
  # A tag whose points were all taken back stays known.
  return {tag: dict(values) for tag, values in points.items() if values}, histograms


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


def test_points_are_taken_back_by_a_rollback_and_long_lists_become_histograms(tmp_path):
  pytest.importorskip("tensorboardX")
  (sink,) = make_sinks("tensorboard", tmp_path, os.environ)
  load = list(np.linspace(0, 1, 64) / 32)
  sink.resume(0)
  for step in (1, 2, 3, 4):
    sink.write({"step": step, "loss": float(step), "layers": {"0": {"load": load}}})
  sink.resume(2)
  sink.write({"step": 3, "loss": 0.5, "layers": {"0": {"load": [0.0] * 64}}})
  sink.close()
  points, histograms = read_back(tmp_path / "tensorboard")
  assert points == {"loss": {1: 1.0, 2: 2.0, 3: 0.5}}
  seen = histograms["layers/0/load"]
  assert set(seen) == {1, 2, 3}
  assert seen[1].num == sum(seen[1].bucket) == 64
  assert (seen[1].min, seen[1].max) == (0, load[-1])
  assert seen[1].sum == pytest.approx(sum(load))
  assert seen[3].max == 0


def test_a_point_of_tensorboard_that_the_disk_refuses_is_an_error_of_the_sink(tmp_path):
  pytest.importorskip("tensorboardX")
  (sink,) = make_sinks("tensorboard", tmp_path, os.environ)
  (tmp_path / "tensorboard").write_text("in the way")
  with pytest.raises(OSError):
    sink.resume(0)


# W&B.


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


class FakeRun:
  """What the sink uses of W&B's run."""

  def __init__(self, step):
    self.step, self.logged = step, []

  def log(self, values, step):
    self.logged.append((step, values["loss"]))

  def finish(self):
    self.logged.append("finish")


@pytest.mark.parametrize("reached, expected", [(0, [1, 2, 3, 4, 5]), (4, [4, 5])])
def test_a_step_that_wandb_has_is_not_sent_again(monkeypatch, tmp_path, reached, expected):
  fake = FakeRun(reached)

  class Wandb:
    Settings, Histogram = dict, list

    @staticmethod
    def init(**fields):
      assert fields["resume"] == "allow"
      return fake

  monkeypatch.setitem(sys.modules, "wandb", Wandb)
  monkeypatch.setenv("WANDB_MODE", "offline")
  (sink,) = make_sinks("wandb", tmp_path, os.environ)
  sink.resume(0)
  for step in (1, 2, 3, 4):
    sink.write({"step": step, "loss": 1.0})
  sink.resume(2)
  for step in (3, 4, 5):
    sink.write({"step": step, "loss": 2.0})
  sink.close()
  assert [point[0] for point in fake.logged[:-1]] == expected
  assert fake.logged[-1] == "finish"


# Profiles.


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
