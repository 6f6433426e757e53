"""Commands that are printed for a user to run next."""

import ast
import gzip
import pathlib
import shlex
import shutil

ROOT = pathlib.Path(__file__).parents[2]


def test_the_commands_that_are_printed_run_as_they_are_whatever_a_folder_is_called(
  here, trained, again, tmp_path
):
  workdir = tmp_path / "my 'first' $run"
  shutil.copytree(trained, workdir)
  result = here("train", *again, f"--workdir={workdir}")
  assert result.code == 0, result
  printed = [line.split(":", 1)[1] for line in result.out.splitlines() if "python -m" in line]
  assert [shlex.split(line)[:4] for line in printed] == [
    ["python", "-m", f"launch.{name}", f"--workdir={workdir}"] for name in ("evaluate", "generate")
  ]


def test_no_command_with_a_name_in_it_is_printed_unquoted():
  for path in ROOT.glob("jaxmoe/**/*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      texts = node.values if isinstance(node, ast.JoinedStr) else []
      parts = [part.value for part in texts if isinstance(part, ast.Constant)]
      assert not any("python -m" in part for part in parts), (path, parts)


def test_what_only_training_can_change_is_no_flag_of_a_command_that_uses_a_run(
  here, trained, tmp_path
):
  whole = gzip.compress(b'{"text": "words"}\n' * 999, mtime=0)
  (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
  result = here("evaluate", f"--workdir={trained}", f"--text={tmp_path}")
  assert result.code == 2, result
  advice = "--config.data.allow_broken_files=true (a flag of python -m launch.train; this command"
  assert advice in result.err and len(result.err.splitlines()) == 1


def test_a_path_that_holds_nothing_is_named_with_its_flag(here, trained, tmp_path):
  result = here("evaluate", f"--workdir={trained}", f"--text={tmp_path}/nowhere")
  assert result.code == 2
  assert result.err.startswith("error: --text: ") and "set path" not in result.err
