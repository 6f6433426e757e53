"""launch.doctor: what it prints of a machine, its exit code and its report."""

import dataclasses
import os
import pathlib

import pytest

from jaxmoe.commands import doctor
from tests.doctor.machines import GOOD, JUDGED, trial


@pytest.fixture
def seen(here, monkeypatch, tmp_path):
  """Returns a function that runs the command on given facts."""

  def run(found, *arguments):
    monkeypatch.setattr(doctor, "collect", lambda workdir, cache: found)
    return here("doctor", f"--workdir={tmp_path}", *arguments)

  return run


@pytest.mark.parametrize("case, code", [("busy", 0), ("full disk", 1)])
def test_only_a_problem_makes_the_exit_code_one(seen, case, code):
  result = seen(JUDGED[case][0])
  assert (result.code, result.err) == (code, "")


def test_a_report_is_written_without_the_home_directory_or_the_environment(
  seen, tmp_path, monkeypatch
):
  monkeypatch.setenv("HOME", "/home/somebody")
  monkeypatch.setenv("SECRET_TOKEN", "hunter2")
  home = pathlib.Path.home()
  errors = f'File "{home}/x.py", line 1\n' * 100 + f"ImportError: no y in {home}/z"
  found = dataclasses.replace(trial(1, errors, run=None), workdir=GOOD.workdir)
  found = dataclasses.replace(found, cache=dataclasses.replace(GOOD.cache, path=f"{home}/.cache"))
  out = tmp_path / "report.txt"
  result = seen(found, f"--out={out}")
  assert result.code == 1
  text = out.read_text()
  assert "somebody" not in text + result.out and "hunter2" not in text
  assert "ImportError: no y in ~/z" in text and "GB free at ~/.cache" in text
  assert text.count("~/x.py") == 59
  assert all(line in text for line in result.out.splitlines()[1:-1])
  again = seen(found, f"--out={out}")
  assert again.code == 2 and "is there already" in again.err
  assert out.read_text() == text


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(seen, tmp_path):
  result = seen(None, f"--out={tmp_path}/missing/report.txt")
  assert result.code == 2
  assert len(result.err.splitlines()) == 1


def test_the_doctor_finds_this_installation_able_to_train(alone, tmp_path):
  result = alone("doctor", f"--workdir={tmp_path}/runs", f"--out={tmp_path}/report.txt")
  lines = [line for line in result.out.splitlines() if line.startswith(("ok", "warn", "prob"))]
  stands = {tuple(line.split()[1:2]): line for line in lines}
  # Free memory, disks and speeds are this machine's; that it trains is ours.
  for name in ("python", "packages", "devices", "matmul", "training"):
    assert stands[(name,)].startswith(("ok", "warning")), result
  assert "3 steps, loss " in result.out and "checkpoint restored and equal" in result.out
  assert result.err == ""
  assert os.listdir(tmp_path) == ["report.txt"]
