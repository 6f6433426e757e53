"""launch.checkpoints: lists, verifies and tells apart what a run has saved, and changes nothing."""

import shutil

import pytest


@pytest.fixture
def copied(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / "run")


def test_the_steps_of_a_run_are_listed_and_verified(trained, here):
  result = here("checkpoints", f"--workdir={trained}")
  assert (result.code, result.err) == (0, "")
  head, _, *steps = result.out.splitlines()
  assert head == f"{trained}/checkpoints, of the store orbax:"
  assert [line.split()[0] for line in steps] == ["4", "6"]
  assert all(line.endswith("whole") for line in steps)
  result = here("checkpoints", f"--workdir={trained}", "--verify")
  assert result.code == 0 and len(result.out.splitlines()) == 2
  assert "step 6: all" in result.out


def test_a_damaged_file_is_found_and_stays(copied, here):
  largest = max((copied / "checkpoints/6/arrays").rglob("*"), key=lambda path: path.stat().st_size)
  raw = bytearray(largest.read_bytes())
  raw[len(raw) // 2] ^= 1
  largest.write_bytes(bytes(raw))
  result = here("checkpoints", f"--workdir={copied}", "--verify")
  assert result.code == 1
  assert "step 4: all" in result.out and "arrays are not as they were written" in result.out
  assert here("checkpoints", f"--workdir={copied}", "--verify", "--step=4").code == 0
  assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["4", "6"]


def test_two_steps_are_told_apart_and_a_copy_is_the_same(trained, copied, here):
  result = here("checkpoints", f"--workdir={trained}", f"--diff={copied}")
  assert result.code == 0 and "0 of " in result.out
  result = here("checkpoints", f"--workdir={trained}", f"--diff={copied}", "--other_step=4")
  assert result.code == 1
  assert "params/embed/table: " in result.out and "relative norm" in result.out
  assert "record: step" in result.out


@pytest.mark.parametrize(
  ("flags", "text"),
  [
    ([], "--workdir is missing"),
    (["--workdir=RUN", "--step=5"], "step 5 is not there; whole steps: 4, 6"),
    (["--workdir=RUN", "--other_step=4"], "--other_step is a step of --diff"),
    (["--workdir=RUN", "--diff=RUN", "--verify"], "give one of them"),
    (["--workdir=RUN", "--diff=RUN/no"], "holds no checkpoint"),
  ],
)
def test_bad_input_is_one_line(trained, here, flags, text):
  result = here("checkpoints", *(flag.replace("RUN", str(trained)) for flag in flags))
  assert result.code == 2 and text in result.err and result.err.count("\n") == 1
