"""What the doctor makes of a machine: facts are collected here, and judged without one."""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile

import pytest

from jaxmoe.cost.host import HostMemory
from jaxmoe.doctor import facts
from jaxmoe.doctor.bug_report import finding_lines
from jaxmoe.doctor.diagnosis import MB, diagnose, satisfies
from jaxmoe.doctor.facts import Trial, parse_requirement
from tests.doctor.machines import GOOD, JUDGED, device, trial, with_


def test_a_good_machine_gives_no_reason_to_complain():
  findings = diagnose(GOOD)
  assert {finding.level for finding in findings} == {"ok"}
  names = {"python", "packages", "extras", "devices", "cores", "memory", "workdir", "writing"}
  names |= {"cache", "open files", "shared", "clock", "matmul", "training"}
  assert {finding.name for finding in findings} == names
  assert finding_lines(findings)[-1] == "all is well"


@pytest.mark.parametrize("case", JUDGED)
def test_a_condition_is_judged_and_comes_with_its_cure(case):
  found, level, name, words = JUDGED[case]
  bad = [finding for finding in diagnose(found) if finding.level != "ok"]
  mine = [finding for finding in bad if finding.name == name]
  assert [finding.level for finding in mine] == [level], bad
  assert words in mine[0].text
  assert len(mine[0].cure) > 10
  assert len(bad) == 1 or case == "no device"
  lines = finding_lines(diagnose(found))
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
