"""The commands of README, docs, CONTRIBUTING and the notes beside the code are there, and run."""

import configparser
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
JOBS = ("train", "data", "public_models", "evaluate", "benchmarks", "surgery", "layouts",
        "clusters", "faults", "python", "design")  # fmt: skip
"""The pages of docs/, in the order in which their blocks run."""
PAGES = sorted([
  *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/*.md"),
  *ROOT.glob("launch/**/*.md"),
])  # fmt: skip
ELSEWHERE = ("make test", "make quickstart", ". .venv")
"""What CI runs itself, and what a shell of one's own needs."""
NEEDS = ("slurm", "tpu", "gpu", "hours")
SHELL = ("mkdir", "printf", "sbatch")
"""What else a block may call."""


def fenced(page, language):
  """Returns (what it needs or nothing, text) of the blocks of a language."""
  found = re.findall(rf"^```{language}(.*)\n((?s:.*?))^```$", page.read_text(), re.MULTILINE)
  return [(info.strip().removeprefix("needs: "), text) for info, text in found]


def command_lines(block):
  """Returns the commands of a block; of one that starts others elsewhere, what it runs there."""
  lines = [line.strip() for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
  if lines[0].startswith("gcloud "):
    return [" ".join(lines).partition(".venv/bin/")[2].rstrip("'")]
  return [line for line in lines if line]


def blocks(page):
  """Returns the blocks of commands of a page, fenced or indented, each a list of command lines."""
  text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
  indented = re.findall(r"(?:^ {4}\S.*\n(?:^ {4,}\S.*\n)*)", text, re.MULTILINE)
  indented = [one for one in map(command_lines, indented)
              if one[0].startswith(("python ", "make ", ". .venv"))]  # fmt: skip
  return indented + [command_lines(text) for _, text in fenced(page, "sh")]


def inline(page):
  """Returns the commands between backticks of a page."""
  text = re.sub(r"^```.*?^```$|^ {4}.*?$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
  spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))
  known = re.compile(r"(python|pytest|pip|make|jaxmoe|launch\.\w+) ")
  return [span for span in spans if known.match(f"{span} ")]


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
  if name == "NAME":
    return
  module = importlib.import_module(f"jaxmoe.commands.{name}")
  fields = [word for word in arguments if word.startswith(PREFIX)]
  rest = [word for word in arguments if word not in fields]
  values = flags.FlagValues()
  for flag in module.FLAGS._flags().values():
    values[flag.name] = flag
  known = {flag: values[flag] for flag in values}
  for word in rest:
    if word.startswith("--"):
      flag, given, value = word[2:].partition("=")
      assert flag in known or flag.removeprefix("no") in known, f"launch.{name} has no --{flag}"
      if given and not (value.isupper() or "|" in value or "..." in value):
        known[flag].parser.parse(value)  # raises where it is no value of this flag
  config = [word.partition("=")[2] for word in rest if word.startswith("--config=")]
  if config and config[0].startswith("configs/") and config[0].isascii() and "..." not in config[0]:
    # A folder that a block makes is not there yet.
    recipe = re.sub(r":text=[^,]+", f":text={ROOT}/tests/launch/before/text/plain", config[0])
    load_recipe(str(ROOT / recipe), fields)


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
  elif first == "jaxmoe":
    check_launch(rest[0], rest[1:])
  elif first == "sbatch":
    assert (ROOT / rest[0]).exists()
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
    assert first in ("python", ".", *SHELL), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_block_that_does_not_run_says_what_it_needs(page):
  assert {needs for needs, _ in fenced(page, "sh")} <= {"", *NEEDS}


def test_readme_leads_to_every_page_and_is_short():
  text = (ROOT / "README.md").read_text()
  assert set(re.findall(r"\(docs/(\w+)\.md\)", text)) == {*JOBS}
  assert {path.stem for path in ROOT.glob("docs/*.md")} == {*JOBS}
  assert len(text.splitlines()) <= 150
  for page in ROOT.glob("docs/*.md"):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
      assert (page.parent / link).exists(), (page.name, link)


def test_the_tree_of_readme_has_every_package_on_its_level():
  text = (ROOT / "README.md").read_text()
  told = {name: int(level) for name, level in re.findall(r"^ {6}(\w+)/ +(\d) ", text, re.MULTILINE)}
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  layers = config["importlinter:contract:levels"]["layers"].split("\n")
  rows = [re.findall(r"jaxmoe\.(\w+)", row) for row in reversed(layers) if row.strip()]
  levels = {name: level for level, row in enumerate(rows) for name in row}
  here = {path.parent.name for path in ROOT.glob("jaxmoe/*/__init__.py")}
  assert told == {name: level for name, level in levels.items() if name in here}


def run(line, cwd, env):
  """Runs a line of a block, which must succeed."""
  done = subprocess.run(
    ["bash", "-ec", line], cwd=cwd, env=env, capture_output=True, text=True, timeout=3600
  )
  assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
  assert "Traceback" not in done.stderr, (line, done.stderr)


@pytest.mark.slow
def test_the_blocks_of_all_pages_run_in_their_order(tmp_path):
  clone = tmp_path / "clone"
  left_out = shutil.ignore_patterns(".git", ".venv*", "/runs", "__pycache__", "*.egg-info")
  shutil.copytree(ROOT, clone, ignore=left_out)
  own = {
    "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "XDG_CACHE_HOME": str(tmp_path / "cache"),
    "PYTHONPATH": str(clone),
  }
  kept = {key: os.environ[key] for key in os.environ if key not in ("XLA_FLAGS", "NPROC")}
  kept.pop("JAX_NUM_CPU_DEVICES", None)
  ran = 0
  for page in [ROOT / "README.md", *(ROOT / "docs" / f"{job}.md" for job in JOBS)]:
    marked = [command_lines(text) for needs, text in fenced(page, "sh") if needs]
    lines = [line for block in blocks(page) if block not in marked for line in block]
    for line in lines:
      if not line.startswith(ELSEWHERE):
        run(line, clone, {**kept, **own})
        ran += 1
    if python := "\n".join(text for _, text in fenced(page, "python")):
      (clone / "page.py").write_text(python)
      run("python page.py", clone, {**kept, **own})
  assert ran > 20
