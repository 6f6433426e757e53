"""A run that hangs is ended with all stacks written down, and goes on."""

import pytest

from tests.faults import points, runs

HANGS = {
  "data": (("jaxmoe.data.stream:BatchStream.__next__", 6),),
  "step": (("jaxmoe.train.step_line:summarize", 6),),
  "evaluation": (("jaxmoe.train.evaluate:score_rows", 8),),
  "samples": (("jaxmoe.train.hooks:generate", 2),),
  "checkpoint": ((f"{points.STORE}.write", 3), (f"{points.STORE}.wait", 3)),
}


@pytest.mark.slow
def test_a_run_that_hangs_is_ended_with_its_stacks_and_goes_on(case, seed):
  rng = case.begin("stalled_step", seed)
  phase = list(HANGS)[seed % len(HANGS)]
  target, calls = rng.choice(HANGS[phase])
  at = {"target": target, "call": rng.randint(1, calls), "when": rng.choice(("before", "after"))}
  # Compiling anew on a busy machine takes its seconds too.
  limit = {"train.stall_s": 8.0}
  ended = case.run({"do": "stay", "seconds": 900, "at": at}, changes=limit)
  assert ended.code == 42, ended
  assert ended.err.splitlines()[-1].startswith("error: nothing has begun for "), ended.err
  assert "in stay" in ended.err and "Thread 0x" in ended.err
  assert "in stay" in (case.workdir / "stacks.txt").read_text()
  stalled, = runs.events(case.workdir, "stalled")
  assert stalled["time"]["waited_s"] >= 8
  case.recover()
