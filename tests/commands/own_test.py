"""What commands alone do, and where each of them is found."""

import ast
import pathlib

import pytest

from jaxmoe.commands import COMMANDS
from jaxmoe.commands import parity as parity_command

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS_ALONE = {
  "absl.flags", "absl.app", "argparse", "os.environ", "os.getenv", "os.putenv",
  "jax.config.update", "jax.distributed.initialize", "jax.monitoring",
}  # fmt: skip
BESIDE = {"__init__", "entry", "bench_side", "doctor_trial", "start_probe"}
"""Modules beside the commands that are none."""
SHIM = """\
\"\"\"`python -m launch.{0}`, from the clone: jaxmoe/commands/{0}.py.\"\"\"

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("{0}")
"""


def touched(text):
  """Returns which of COMMANDS_ALONE a module imports or has in hand."""
  found, names = set(), {}
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
      names |= {alias.asname: alias.name for alias in node.names if alias.asname}
    elif isinstance(node, ast.ImportFrom):
      found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
      names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    elif isinstance(node, ast.Attribute):
      first, *rest = ast.unparse(node).split(".")
      found.add(".".join([names.get(first, first), *rest]))
  return found & COMMANDS_ALONE


def test_commands_alone_read_flags_and_the_environment_and_touch_settings_of_the_process():
  package = ROOT / "jaxmoe"
  files = [path for path in package.rglob("*.py") if "commands" not in path.parts]
  assert len(files) > 300
  found = {str(path.relative_to(ROOT)): touched(path.read_text()) for path in files}
  assert {path: names for path, names in found.items() if names} == {}
  theirs = set().union(*(touched(path.read_text()) for path in package.glob("commands/**/*.py")))
  assert theirs >= {"absl.flags", "os.environ", "jax.config.update"}


@pytest.mark.parametrize(
  "text, names",
  [
    ("import os\nos.environ['A']", {"os.environ"}),
    ("import os as system\nsystem.getenv('A')", {"os.getenv"}),
    ("from os import environ", {"os.environ"}),
    ("from absl import flags", {"absl.flags"}),
    ("def f():\n  import argparse", {"argparse"}),
    ("import jax\njax.config.update('jax_platforms', 'cpu')", {"jax.config.update"}),
    ("from jax import config\nconfig.update('a', 1)", {"jax.config.update"}),
    ("import jax\nstr(jax.config.values)", set()),
    ("import jax\njax.distributed.initialize()", {"jax.distributed.initialize"}),
    ("import os\nos.path", set()),
  ],
)
def test_what_a_module_touches_is_seen_however_it_is_written(text, names):
  assert touched(text) == names


def test_a_command_is_found_under_one_name_in_the_package_and_in_the_clone():
  in_package = {path.stem for path in (ROOT / "jaxmoe" / "commands").glob("*.py")}
  assert in_package - BESIDE == {*COMMANDS}
  shims = {path.stem: path.read_text() for path in (ROOT / "launch").glob("*.py")}
  assert {*shims} - BESIDE == {*COMMANDS}
  for name in COMMANDS:
    assert shims[name] == SHIM.format(name)


def test_the_table_of_an_installed_package_is_not_written_to(tmp_path, monkeypatch):
  assert parity_command.table_of_clone() == ROOT / "jaxmoe" / "parity" / "results.json"
  there = tmp_path / "site-packages" / "jaxmoe" / "parity" / "results.json"
  monkeypatch.setattr(parity_command, "PATH", there)
  with pytest.raises(parity_command.InputError) as raised:
    parity_command.table_of_clone()
  said = str(raised.value)
  assert said.startswith(f"--out is missing: {there}") and "--out=parity.json" in said
