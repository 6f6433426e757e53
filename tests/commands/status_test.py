"""launch.status as a command: without JAX, for as long as a run runs, or one line."""

import pytest

from jaxmoe.status.run_status import read_status
from jaxmoe.status.status_page import status_lines
from tests.status.run_files import PROCESS, held, line, write_run


def test_the_command_starts_no_jax_and_writes_plain_text_into_a_pipe(tmp_path, alone):
  run = write_run(tmp_path / "run", [line(1)], [PROCESS, {"event": "done"}])
  program = (
    "-c",
    "import runpy, sys, atexit\n"
    "atexit.register(lambda: print('jax' in sys.modules, 'flax' in sys.modules))\n"
    "runpy.run_module('launch.status', run_name='__main__')\n",
  )
  for encoding, sign in (("ascii", "+"), ("utf-8", "▅")):
    environment = {"PYTHONIOENCODING": encoding}
    result = alone("status", f"--workdir={run}", "--watch=9", program=program, env=environment)
    assert (result.code, result.err) == (0, "")
    *lines, modules = result.out.splitlines()
    assert modules == "False False"
    assert f"    0 {sign * 8} " in result.out
    assert all(len(text) <= 80 and text.isprintable() for text in lines)


def test_watching_ends_with_the_run(tmp_path, here, monkeypatch):
  run = write_run(tmp_path / "run", [line(1)], [PROCESS])
  waits = []

  def sleep(seconds):
    waits.append(seconds)
    if len(waits) == 2:
      with open(run / "events.jsonl", "a") as file:
        file.write('{"event": "done"}\n')

  monkeypatch.setattr("time.sleep", sleep)
  with held(run):
    result = here("status", f"--workdir={run}", "--watch=2.5")
  assert result.code == 0, result
  assert waits == [2.5, 2.5]
  assert result.out.count("state     running") == 2
  assert result.out.count("state     done") == 1


@pytest.mark.parametrize(
  "arguments, code, words",
  [
    ((), 2, "--workdir is missing"),
    (("--workdir=/nowhere/at/all",), 4, "no run here"),
    (("--workdir=x", "--watch=-1"), 2, "watch"),
    (("--workdir=x", "stray"), 2, "'stray'"),
  ],
)
def test_bad_arguments_end_in_one_line(here, arguments, code, words):
  result = here("status", *arguments)
  assert result.code == code
  assert len(result.err.splitlines()) == 1
  assert words in result.err


def test_a_finished_run_of_the_real_trainer_is_told(trained):
  text = "\n".join(status_lines(read_status(trained)))
  assert read_status(trained).state == "done"
  assert "step      6 of 6 (100.0%)" in text
  assert "held out  bits/byte of all at step 6: " in text
  assert "saved     step 6, " in text
  assert "of wall time: " in text
