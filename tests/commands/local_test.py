"""One run as several processes of this machine: the same numbers, one set of files, one line."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from jaxmoe.commands import local
from jaxmoe.commands.process import process_group
from jaxmoe.commands.process.command_line import PROCESS
from jaxmoe.core.errors import InputError, PeerError

QUICK = ("evaluation.every=0", "samples.every=0")


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir, kind):
  found = map(json.loads, (workdir / "events.jsonl").read_text().splitlines())
  return [event for event in found if event["event"] == kind]


def digest(workdir):
  return events(workdir, "done")[-1]["digest"]


def losses(workdir):
  return np.array([line["loss"] for line in lines(workdir)])


def test_two_processes_train_as_one_and_one_device_goes_on(
  train_on, here, again, trained, tmp_path
):
  workdir = tmp_path / "run"
  code, out, err = train_on(2, 1, workdir, changes=QUICK)
  assert code == 0, err
  assert err == ""
  assert out.count("done: step 6") == 1
  np.testing.assert_allclose(losses(workdir), losses(trained), rtol=1e-5)
  assert len(events(workdir, "process")) == len(events(workdir, "done")) == 1
  theirs = {path.name for path in workdir.iterdir()}
  assert theirs | {"samples.md"} == {path.name for path in trained.iterdir()} | {"samples.md"}
  before = digest(workdir)
  result = here("train", *again, f"--workdir={workdir}")
  assert result.code == 0, result
  assert "nothing to do" in result.out
  assert digest(workdir) == before, "one device restored other bits than two processes saved"


@pytest.mark.slow
def test_a_row_lies_over_two_processes_and_one_device_goes_on(
  train_on, here, again, trained, tmp_path
):
  workdir, flags = tmp_path / "run", ("--allow_unproven",)
  spread = ("data=1", "context=4", "attend=ring", "order=zigzag")
  changes = (*QUICK, *(f"parallel.{field}" for field in spread))
  code, _, err = train_on(2, 2, workdir, *flags, changes=changes)
  assert code == 0, err
  np.testing.assert_allclose(losses(workdir), losses(trained), rtol=1e-5)
  before = digest(workdir)
  result = here("train", *again, f"--workdir={workdir}")
  assert result.code == 0, result
  assert "nothing to do" in result.out
  assert digest(workdir) == before, "one device restored other bits than two processes saved"


def test_a_bad_config_ends_all_with_one_line_and_writes_nothing(train_on, tmp_path):
  wrong = {
    ("train.num_steps=0",): "at least 1",
    ("parallel.data=4", "train.batch_size=8"): "asks for 4 devices",
  }
  for changes, expected in wrong.items():
    code, out, err = train_on(2, 1, tmp_path / "run", changes=changes)
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert expected in err
    # A note may say that sources have changed since the layout was shown equal to one device.
    assert all(line.startswith("note: sources have changed") for line in out.splitlines()), out
    assert not (tmp_path / "run").exists()


def test_one_that_is_killed_makes_the_code_43_and_the_rest_is_killed_in_time(crew):
  script = (
    "import os, signal, time\n"
    f"if os.environ[{PROCESS!r}] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
    "time.sleep(600)"
  )
  process = crew(3, 1, sys.executable, "-c", script, heartbeat_s=1)
  _, err = process.communicate(timeout=60)
  assert process.returncode == PeerError.code == 43
  assert err.splitlines() == [
    "error: process 1 was ended by SIGKILL; the same command goes on from the last checkpoint"
  ]


def test_signals_are_passed_on_and_output_is_told_apart(crew):
  script = (
    "import os, signal, sys\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"  # it waits, whenever it comes
    f"print('ready', os.environ[{PROCESS!r}], flush=True)\n"
    "signal.sigwait([signal.SIGTERM])\n"
    "sys.exit(42)"
  )
  process = crew(2, 1, sys.executable, "-c", script)
  assert process.stdout.readline() == "ready 0\n"
  assert process.stderr.readline() == "[1] ready 1\n"
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 42


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child that its parent died")
def test_no_process_survives_the_death_of_launch_local(crew):
  script = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)"
  process = crew(2, 1, sys.executable, "-c", script)
  pids = [int(process.stdout.readline()), int(process.stderr.readline().split()[-1])]
  process.kill()
  process.communicate(timeout=60)
  until = time.monotonic() + 60
  while any(is_alive(pid) for pid in pids):
    assert time.monotonic() < until, pids
    time.sleep(0.05)


def is_alive(pid):
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def test_the_worst_code_is_the_one_that_repeating_does_not_mend():
  assert process_group.worst([0, 0]) == 0
  assert process_group.worst([0, 42]) == 42
  assert process_group.worst([43, 42, 43]) == 43
  assert process_group.worst([43, 2, 43]) == 2
  assert process_group.worst([43, 4, 3]) == 4
  assert process_group.worst([2, 1, 43]) == 1


def test_a_command_is_given_by_its_name_or_as_it_is():
  train = [sys.executable, "-m", "jaxmoe.commands.train", "--a"]
  assert local.program_of(["train", "--a"]) == train
  assert local.program_of(["launch.train", "--a"]) == train
  assert local.program_of(["jaxmoe", "train", "--a"]) == train
  assert local.program_of(["python", "-m", "x"]) == [sys.executable, "-m", "x"]
  assert local.program_of(["/bin/true"]) == ["/bin/true"]
  with pytest.raises(InputError, match="no command"):
    local.program_of([])


def test_processes_get_their_devices_whatever_xla_flags_say(monkeypatch):
  count = "--xla_force_host_platform_device_count=3"
  monkeypatch.setenv("XLA_FLAGS", f"--xla_other=1 {count}")
  env = process_group.environment(2, 4, 30)
  assert (env["XLA_FLAGS"], env["JAX_NUM_CPU_DEVICES"]) == ("--xla_other=1", "4")
  assert "XLA_FLAGS" in os.environ


def test_what_does_not_train_is_done_by_one_process(crew):
  process = crew(2, 1, "launch.recipe_that_is_none")
  _, err = process.communicate(timeout=60)
  assert process.returncode == 2 and "launch.recipe_that_is_none: cannot be run" in err
  process = crew(2, 1, "launch.evaluate")
  _, err = process.communicate(timeout=60)
  assert process.returncode == 2
  assert err.count("\n") == 1, err
