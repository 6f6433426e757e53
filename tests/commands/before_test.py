"""Runs begun by the code of 2026-11-28, killed after step 4 of 8: they go on as they were.

before/chats has messages and plain text, a `Chat` of its own, mlp and cosine gates and
dispatch by capacity, in float32; `expected.json` is what that code wrote from step 5 on, as a user
runs it: in a process of its own, on one device, compiled as XLA does by default.
"""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
BEFORE = ROOT / "tests" / "launch" / "before"
MADE_ON = ("0.10.2", "35c33fef")
"""The jax and the kind of processor that expected.json was made with: elsewhere sums round
otherwise."""


def machine():
  """Returns the version of jax and a digest of what the compiler sees of the processor."""
  path = pathlib.Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else []
  seen = sorted({line for line in lines if line.startswith(("model name", "flags", "cache size"))})
  return jax.__version__, hashlib.sha256("\n".join(seen).encode()).hexdigest()[:8]


def lines(workdir):
  found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{key: value for key, value in line.items() if key != "time"} for line in found]


def numbers(tree):
  if isinstance(tree, dict):
    return {f"{key}/{name}": value for key in tree for name, value in numbers(tree[key]).items()}
  if isinstance(tree, list):
    return numbers(dict(enumerate(tree)))
  return {"": tree}


@pytest.fixture
def resume(alone, tmp_path):
  def run(name):
    workdir = tmp_path / name
    shutil.copytree(BEFORE / name, workdir)
    as_users = {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}
    recipe = f"--config={workdir}/config.json"
    result = alone("train", recipe, f"--workdir={workdir}", env=as_users)
    assert result.code == 0, result
    return workdir, result.out

  return run


def test_a_run_of_before_goes_on_bit_for_bit(resume):
  workdir, _ = resume("chats")
  expected = json.loads((BEFORE / "chats" / "expected.json").read_text())
  got = lines(workdir)[4:]
  assert [line["step"] for line in got] == [5, 6, 7, 8]
  if machine() == MADE_ON:
    assert got == expected["lines"]
    events = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    (done,) = (event for event in events if event["event"] == "done")
    assert done["digest"] == expected["digest"]
  else:
    for line, was in zip(got, expected["lines"], strict=True):
      line, was = numbers(line), numbers(was)
      assert line.keys() == was.keys()
      for name in was:
        if name.startswith("layers"):  # a choice near a tie may fall otherwise, and its counts
          continue
        np.testing.assert_allclose(line[name], was[name], rtol=1e-3, err_msg=name)
