"""What is said to be left is what will be done, not what was done once."""

import pytest

from jaxmoe.train.progress import Display, Pace

STEP_S, EVALUATION_S, CHECKPOINT_S = 0.1, 2.0, 1.0


def seconds_of(step, first=0):
  """`time.seconds` of a step of a run that compiles at first, and scores and saves at 50s."""
  seconds = {"step": STEP_S - 0.02, "data": 0.02}
  if step == first + 1:
    seconds["step"] += 15
  if step % 50 == 0:
    seconds["evaluation"] = EVALUATION_S
    seconds |= {"compile": 40.0} if step == 50 else {}
  if step % 50 == 1 and step > first + 1:  # the line after that of its step
    seconds["checkpoint"] = CHECKPOINT_S
  return seconds


@pytest.mark.parametrize("first", [0, 500])
@pytest.mark.parametrize("done", [2, 10, 49, 60, 101, 149, 400])
def test_what_is_left_is_as_long_as_it_takes(first, done):
  pace = Pace(first)
  for step in range(first + 1, first + done + 1):
    pace.add(step, seconds_of(step, first))
  rest = 2000 - done
  beside = EVALUATION_S + CHECKPOINT_S if done > 50 else 0.0  # not seen yet
  assert pace.left_s(rest) == pytest.approx(rest * (STEP_S + beside / 50), rel=0.05)


def test_one_step_that_took_long_says_nothing_of_those_to_come():
  pace = Pace(0)
  for step in range(1, 101):
    pace.add(step, {"step": 30.0 if step == 60 else 0.1})
  assert pace.left_s(100) == pytest.approx(10)


def test_before_the_first_line_nothing_is_known():
  assert Pace(3).left_s(100) == 0


def test_a_line_tells_it(capsys):
  display = Display(num_steps=1500, log_every=100, bytes_per_token=1.0)
  display.start(0)
  for step in range(1, 101):
    clock = {"tokens_per_s": 1.0, "mfu": 0.1, "seconds": seconds_of(step)}
    display.step({"step": step, "loss": 1.0, "time": clock})
  display.close()
  # 1,400 steps of 0.1 s, 28 evaluations of 2 s and 27.5 checkpoints of 1 s: one came in 51 lines.
  assert capsys.readouterr().out.endswith("MFU 10%  3:43 left\n")
