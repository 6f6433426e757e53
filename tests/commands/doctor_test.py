"""What launch.doctor makes of a machine: facts are collected here, and judged without one."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

from jaxmoe.commands import doctor
from jaxmoe.cost.host import HostMemory
from jaxmoe.doctor import facts
from jaxmoe.doctor.diagnosis import GB, MB, diagnose, satisfies
from jaxmoe.doctor.facts import Disk, Facts, Requirement, Trial, parse_requirement

RUN = {"losses": [6.0, 5.5, 5.0], "equal": True, "seconds": 9.0}
TOLD = {
  "devices": [{"platform": "cpu", "kind": "cpu", "memory_bytes": None}],
  "run": RUN,
  "peak_flops_per_s": {"float32": 1e11},
}
GOOD = Facts(
  python=("3.11.7", ">=3.11,<3.13"),
  requirements=(
    Requirement("jax", "<0.12,>=0.10.2", "0.10.2"),
    Requirement("numpy", ">=2.0", "2.4.6"),
    Requirement("wandb", ">=0.31", "0.31.0", "wandb"),
    Requirement("pyarrow", "", None, "data"),
    Requirement("jax", "<0.12,>=0.10.2", "0.10.2", "cuda"),
  ),
  plugins={"jaxlib": "0.10.2"},
  accelerators=(),
  cores=8,
  load=0.5,
  memory=HostMemory(24 * GB, 16 * GB),
  workdir=Disk("runs", 100 * GB, 500.0 * MB, 0.01, 0.0),
  cache=Disk("/cache", 100 * GB, 500.0 * MB, 0.01, 0.0),
  open_files=4096,
  shm_bytes=8 * GB,
  unix_s=1.8e9,
  trial=Trial(TOLD, 0),
)


def with_(**fields):
  return dataclasses.replace(GOOD, **fields)


def trial(code=0, errors="", **results):
  return with_(trial=Trial({**TOLD, **results}, code, errors))


def workdir(**fields):
  return with_(workdir=dataclasses.replace(GOOD.workdir, **fields))


def cache(**fields):
  return with_(cache=dataclasses.replace(GOOD.cache, **fields))


def wants(*requirements):
  return with_(requirements=(*GOOD.requirements, *requirements))


def device(platform, **fields):
  return [{"platform": platform, "kind": "X", "memory_bytes": 80 * GB, **fields}]


JUDGED = {
  "wrong python": (with_(python=("3.13.0", ">=3.11,<3.13")), "problem", "python", "3.13.0, needs"),
  "not installed": (with_(python=("3.11.7", "")), "problem", "python", "not installed in it"),
  "package missing": (
    wants(Requirement("optax", ">=0.2.8", None)), "problem", "packages", "optax is missing"
  ),
  "package too old": (
    wants(Requirement("optax", ">=0.2.8", "0.2.7")), "problem", "packages", "optax 0.2.7, needs"
  ),
  "jax too new": (
    with_(requirements=(Requirement("jax", "<0.12,>=0.10.2", "0.12.0"),), plugins={}),
    "problem", "packages", "jax 0.12.0, needs <0.12",
  ),
  "jaxlib of another jax": (
    with_(plugins={"jaxlib": "0.11.0"}), "problem", "packages", "jaxlib 0.11.0 does not fit"
  ),
  "plugin of another jax": (
    with_(plugins={"jax-cuda13-plugin": "0.9.0"}), "problem", "packages", "does not fit jax 0.10.2"
  ),
  "extra too old": (
    wants(Requirement("torch", ">=2.6", "2.5", "hf")), "warning", "extras", "torch 2.5, needs"
  ),
  "no device": (
    trial(1, "x\nRuntimeError: no backend", devices=None), "problem", "devices", "no device"
  ),
  "unused gpu": (
    with_(accelerators=(("an NVIDIA GPU", "cuda"),)), "warning", "devices", "an NVIDIA GPU, unused"
  ),
  "busy": (with_(load=20.0), "warning", "cores", "20.0 wanted"),
  "one core": (with_(cores=1), "warning", "cores", "1 for this process"),
  "half a core": (with_(cores=0.5), "warning", "cores", "0.5 for this process"),
  "no memory": (with_(memory=HostMemory(4 * GB, GB // 2)), "problem", "memory", "0.5 GB of 4.0 GB"),
  "little memory": (
    with_(memory=HostMemory(8 * GB, 2 * GB)), "warning", "memory", "2.0 GB of 8.0 GB"
  ),
  "a small group": (
    with_(memory=HostMemory(600 * MB, 500 * MB, grouped=True)), "problem", "memory",
    "0.5 GB of 0.6 GB free (the limit of this control group)",
  ),
  "full disk": (
    workdir(free_bytes=100 * MB, error="too little"), "problem", "workdir", "0.1 GB free"
  ),
  "nearly full disk": (workdir(free_bytes=2 * GB), "warning", "workdir", "2.0 GB free"),
  "read-only disk": (
    workdir(error="Read-only file system", write_bytes_per_s=0.0),
    "problem", "workdir", "cannot write at runs: Read-only",
  ),
  "slow disk": (workdir(write_bytes_per_s=5.0 * MB), "warning", "writing", "5 MB/s"),
  "slow sync": (workdir(fsync_s=0.9), "warning", "writing", "900.0 ms"),
  "clock of the disk ahead": (workdir(clock_ahead_s=7.0), "warning", "clock", "+7.0 s off"),
  "clock of the disk behind": (workdir(clock_ahead_s=-7.0), "warning", "clock", "-7.0 s off"),
  "clock in the past": (with_(unix_s=1e9), "problem", "clock", "before this code"),
  "unwritable cache": (cache(error="Permission denied"), "warning", "cache", "Permission denied"),
  "full cache": (cache(free_bytes=10 * MB), "warning", "cache", "10 MB free"),
  "few files": (with_(open_files=256), "warning", "open files", "256 at once"),
  "little shm": (with_(shm_bytes=64 * MB), "warning", "shared", "64 MB free"),
  "slow matmul": (trial(peak_flops_per_s={"float32": 1e9}), "warning", "matmul", "1 GFLOP/s"),
  "crash": (trial(-11, "Segmentation fault", run=None), "problem", "training", "signal 11"),
  "no end": (
    trial(-1, "it did not end within 300 s", run=None), "problem", "training", "did not end"
  ),
  "exit": (trial(1, "Trace\nValueError: x", run=None), "problem", "training", "ValueError: x"),
  "not finite": (trial(run={**RUN, "losses": [6.0, None, 5.0]}), "problem", "training", "nan"),
  "too few steps": (trial(run={**RUN, "losses": [6.0]}), "problem", "training", "[6.0]"),
  "damaged checkpoint": (trial(run={**RUN, "equal": False}), "problem", "training", "other values"),
  "late failure": (trial(1, "RuntimeError: y"), "warning", "training", "then: RuntimeError: y"),
}  # fmt: skip


def test_a_good_machine_gives_no_reason_to_complain():
  findings = diagnose(GOOD)
  assert {finding.level for finding in findings} == {"ok"}
  names = {"python", "packages", "extras", "devices", "cores", "memory", "workdir", "writing"}
  names |= {"cache", "open files", "shared", "clock", "matmul", "training"}
  assert {finding.name for finding in findings} == names
  assert doctor.finding_lines(findings)[-1] == "all is well"


@pytest.mark.parametrize("case", JUDGED)
def test_a_condition_is_judged_and_comes_with_its_cure(case):
  found, level, name, words = JUDGED[case]
  bad = [finding for finding in diagnose(found) if finding.level != "ok"]
  mine = [finding for finding in bad if finding.name == name]
  assert [finding.level for finding in mine] == [level], bad
  assert words in mine[0].text
  assert len(mine[0].cure) > 10
  assert len(bad) == 1 or case == "no device"
  lines = doctor.finding_lines(diagnose(found))
  assert all(len(line) <= 80 and line.isprintable() for line in lines)
  assert any(line.startswith(f"{level:<8} {name:<10} ") for line in lines)
  assert any(line.startswith(" " * 20 + "fix: ") for line in lines)
  assert f"1 {level}" in lines[-1]


def test_what_a_system_does_not_say_is_no_reason_to_complain():
  found = with_(memory=None, shm_bytes=None, open_files=-1)
  assert {finding.level for finding in diagnose(found)} == {"ok"}


def test_a_gpu_in_use_is_told_with_its_memory():
  found = dataclasses.replace(
    trial(devices=device("gpu") * 2), accelerators=(("an NVIDIA GPU", "cuda"),)
  )
  (finding,) = [finding for finding in diagnose(found) if finding.name == "devices"]
  assert (finding.level, finding.text) == ("ok", "2 x X (gpu), 80.0 GB each")


@pytest.mark.parametrize(
  "version, wanted, expected",
  [
    ("0.10.2", "<0.12,>=0.10.2", True),
    ("0.10.1", "<0.12,>=0.10.2", False),
    ("0.12.0", "<0.12,>=0.10.2", False),
    ("0.11.9.dev1+cuda", "<0.12,>=0.10.2", True),
    ("2", ">=2.0", True),
    ("10.0", ">=9", True),
    ("1.2", "!=1.2.0", False),
    ("1.2.5", "~=1.2.3", True),
    ("1.3.0", "~=1.2.3", False),
    ("1.2.5", "==1.2.*", True),
    ("1.3", "==1.2.*", False),
    ("3.11.7", ">=3.11, <3.13", True),
    ("1.0", "", True),
    ("1.0", ">1.0", False),
    ("1.0", "<=1.0", True),
  ],
)
def test_versions_are_compared_by_their_numbers(version, wanted, expected):
  assert satisfies(version, wanted) == expected


@pytest.mark.parametrize(
  "line, expected",
  [
    ("jax<0.12,>=0.10.2", ("jax", "<0.12,>=0.10.2", None)),
    ("absl-py>=2.1", ("absl-py", ">=2.1", None)),
    ('pyarrow; extra == "data"', ("pyarrow", "", "data")),
    ("jax[cuda13]<0.12,>=0.10.2; extra == 'cuda'", ("jax", "<0.12,>=0.10.2", "cuda")),
    ("torch (>=2.6) ; extra == 'hf'", ("torch", ">=2.6", "hf")),
  ],
)
def test_a_requirement_is_read_from_its_line(line, expected):
  found = parse_requirement(line)
  assert (found.name, found.wanted, found.extra) == expected


def test_what_the_package_asks_for_is_found_with_installed_versions():
  found = {asked.name: asked for asked in facts.requirements() if asked.extra is None}
  assert found["jax"].found == facts.version("jax") is not None
  assert satisfies(found["jax"].found, found["jax"].wanted)
  assert not any(asked.extra == "dev" for asked in facts.requirements())
  assert facts.version("no-such-package-anywhere") is None


def test_a_disk_is_tried_and_left_as_it_was(tmp_path):
  found = facts.disk(tmp_path / "not" / "yet")
  assert found.error == ""
  assert found.write_bytes_per_s > 0 and found.fsync_s > 0
  assert list(tmp_path.iterdir()) == []


def test_a_small_disk_is_not_filled_to_try_it(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=90 * MB))
  monkeypatch.setattr(tempfile, "NamedTemporaryFile", None)
  assert facts.disk(tmp_path).error == "too little room to try"


def test_a_disk_that_cannot_be_written_is_a_fact_and_no_failure(tmp_path, monkeypatch):
  def refuse(**options):
    raise OSError(30, "Read-only file system")

  monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
  assert facts.disk(tmp_path).error == "Read-only file system"


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm here")
def test_shared_memory_is_no_more_than_the_free_memory_it_is_made_of():
  assert facts.shared_bytes(HostMemory(600 * MB, 5, grouped=True)) == 5
  assert facts.shared_bytes(None) == shutil.disk_usage("/dev/shm").free


@pytest.mark.parametrize(
  "program, code, errors",
  [
    ("print('{\"devices\": [1]}'); print('noise'); raise SystemExit(3)", 3, ""),
    ("print('{\"devices\": [1]}', flush=True); import os; os.kill(os.getpid(), 9)", -9, ""),
    ("print('{\"devices\": [1]}'); 1 / 0", 1, "ZeroDivisionError: division by zero"),
  ],
)
def test_what_a_trial_told_before_it_failed_is_kept(tmp_path, monkeypatch, program, code, errors):
  (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} -c \"$PROGRAM\"\n")
  (tmp_path / "python").chmod(0o755)
  monkeypatch.setenv("PROGRAM", program)
  monkeypatch.setattr(facts.sys, "executable", str(tmp_path / "python"))
  found = facts.trial()
  assert (found.results, found.code) == ({"devices": [1]}, code)
  assert errors in found.errors


def test_what_a_trial_told_before_it_hung_is_kept(monkeypatch):
  def hang(command, timeout, **options):
    raise subprocess.TimeoutExpired(command, timeout, output=b'{"devices": [1]}\n')

  monkeypatch.setattr(facts.subprocess, "run", hang)
  assert facts.trial(7) == Trial({"devices": [1]}, -1, "it did not end within 7 s")


# The command.


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
