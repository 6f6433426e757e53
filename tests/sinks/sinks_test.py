"""Sinks by themselves: their names, and what TensorBoard and W&B are given."""

import os
import re
import sys

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.sinks import make_sinks
from tests.sinks.event_files import read_back


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


# TensorBoard.


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
