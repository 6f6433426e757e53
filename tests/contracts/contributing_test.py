"""What CONTRIBUTING says of adding a component, done to a copy of the tree."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  """A copy of the project with the router of the example added as the text says."""
  here = tmp_path_factory.mktemp("tree")
  for name in ("jaxmoe", "launch", "configs", "tests"):
    shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "setup.cfg"):
    shutil.copy(ROOT / name, here)
  file, line, oracle = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
  imported = "from jaxmoe.moe.routers.lead import Lead\n"
  path = re.search(r"whole file, `(\S+)`", TEXT)[1]
  assert not (here / path).exists()
  (here / path).write_text(file)
  members = here / "jaxmoe/moe/routers/__init__.py"
  head, body = members.read_text().split("ROUTERS = {\n")
  members.write_text(f"{head}{imported}\nROUTERS = {{\n{line}{body}")
  oracles = here / "tests/contracts/oracles/routing.py"
  oracles.write_text(f"{oracles.read_text()}\n\n{imported}\n{oracle}")
  return here


def run(tree, *arguments):
  """Runs Python in the copy; returns its exit code and what it printed."""
  environment = os.environ | {"PYTHONPATH": str(tree)}
  done = subprocess.run(
    [sys.executable, "-m", *arguments], cwd=tree, env=environment, capture_output=True, text=True
  )
  return done.returncode, done.stdout + done.stderr


def test_a_router_of_one_file_and_one_line_passes_the_contract(tree):
  code, said = run(
    tree, "pytest", "-q", "-p", "no:cacheprovider", "tests/contracts/routers_test.py",
    "-k", "lead or Lead or oracle and every",
  )
  assert code == 0, said
  assert int(re.search(r"(\d+) passed", said)[1]) > 20, said


def test_a_wrong_router_fails_the_contract(tree):
  path = tree / "jaxmoe/moe/routers/lead.py"
  right = path.read_text()
  path.write_text(right.replace("top_k(seen.scores_TE, 2)", "top_k(-seen.scores_TE, 2)"))
  code, said = run(
    tree, "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/contracts/routers_test.py",
    "-k", "decision_equals and lead",
  )
  path.write_text(right)
  assert code == 1 and "1 failed" in said, said


@pytest.mark.slow
def test_the_new_name_trains(tree, tmp_path):
  code, said = run(
    tree, "launch.train", "--config=configs/tiny.py:router=lead", f"--workdir={tmp_path}/run",
    "--config.train.num_steps=4",
  )
  assert code == 0, said
  assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4
