"""The commands of README, CONTRIBUTING and the notes beside the code are there, and run."""

import importlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from absl import flags

from jaxmoe.runs.recipe_loading import PREFIX, load_recipe

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("experiments/*/*.md"), *ROOT.glob("launch/**/*.md")])
ELSEWHERE = ("make test", "make quickstart", ". .venv")
"""What CI runs itself, and what a shell of one's own needs."""


def blocks(page):
  """Returns the indented blocks of commands of a page, each a list of command lines."""
  found = []
  for block in re.findall(r"(?:^ {4}\S.*\n(?:^ {4,}\S.*\n)*)", page.read_text(), re.MULTILINE):
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    commands = [line.strip() for line in lines]
    if commands[0].startswith("gcloud "):  # what it runs on every host
      commands = [" ".join(commands).partition(".venv/bin/")[2].rstrip("'")]
    if commands[0].startswith(("python ", "make ", ". .venv")):
      found.append(commands)
  return found


def inline(page):
  """Returns the commands between backticks of a page."""
  text = re.sub(r"^```.*?^```|^ {4}.*?$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
  spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))
  return [span for span in spans if re.match(r"(python|pytest|pip|make|launch\.\w+) ", f"{span} ")]


def commands():
  """Yields (page, command) of all that a reader may type."""
  for page in PAGES:
    of_blocks = (command for block in blocks(page) for command in block)
    yield from ((page, command) for command in dict.fromkeys([*of_blocks, *inline(page)]))


def words(command):
  """Returns the words of a command; what is optional counts as given."""
  return shlex.split(re.sub(r"[\[\]](?!\w*['\"])", " ", command), comments=True)


def check_launch(name, arguments):
  """Raises unless the command is there, has these flags, and the recipe these fields."""
  module = importlib.import_module(f"jaxmoe.commands.{name}")
  fields = [word for word in arguments if word.startswith(PREFIX)]
  rest = [word for word in arguments if word not in fields]
  values = flags.FlagValues()
  for flag in module.FLAGS._flags().values():
    values[flag.name] = flag
  known = {flag: values[flag] for flag in values}
  for word in rest:
    if word.startswith("--"):
      flag = word[2:].partition("=")[0]
      assert flag in known or flag.removeprefix("no") in known, f"launch.{name} has no --{flag}"
  config = [word.partition("=")[2] for word in rest if word.startswith("--config=")]
  if config and config[0].startswith("configs/") and config[0].isascii() and "..." not in config[0]:
    load_recipe(str(ROOT / config[0]), fields)


def check_module(module, arguments):
  """Raises unless a module that is run, and the files and tests it is given, are there."""
  if module == "pytest":
    paths = [word for word in arguments if word.startswith("tests")]
    assert paths or arguments, arguments
    for path in paths:
      assert (ROOT / path.partition("::")[0]).exists(), path
  else:
    path = ROOT.joinpath(*module.split("."))
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize(
  "page, command", list(commands()), ids=lambda value: getattr(value, "name", value)
)
def test_a_command_has_what_it_names(page, command):
  first, *rest = words(command)
  if first == "make":
    assert rest[0] in re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
  elif first == "pip":
    assert rest[:2] == ["install", "-e"], "or the clone that runs is not the one that is edited"
  elif first.startswith("launch."):
    check_launch(first.removeprefix("launch."), rest)
  elif first == "python" and rest[0] == "-m":
    if rest[1].startswith("launch."):
      mine = rest[2 : rest.index("--")] if "--" in rest else rest[2:]
      check_launch(rest[1].removeprefix("launch."), mine)
      if "--" in rest:
        program, *others = rest[rest.index("--") + 1 :]
        check_launch(program.removeprefix("launch."), others)
    else:
      check_module(rest[1], rest[2:])
  else:
    assert first in ("python", "."), command


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md"])
def test_the_blocks_of_a_page_run_in_their_order(name, tmp_path):
  clone = tmp_path / "clone"
  left_out = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", "*.egg-info")
  shutil.copytree(ROOT, clone, ignore=left_out)
  lines = [line for block in blocks(ROOT / name) for line in block]
  lines = [line for line in lines if not line.startswith(ELSEWHERE)]
  assert len(lines) > 15
  own = {
    "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "XDG_CACHE_HOME": str(tmp_path / "cache"),
  }
  kept = {key: os.environ[key] for key in os.environ if key not in ("XLA_FLAGS", "NPROC")}
  kept.pop("JAX_NUM_CPU_DEVICES", None)
  for line in lines:
    done = subprocess.run(
      ["bash", "-ec", line], cwd=clone, env={**kept, **own}, capture_output=True, text=True,
      timeout=900,
    )
    assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
    assert "Traceback" not in done.stderr, (line, done.stderr)
