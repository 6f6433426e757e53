"""Which tests a change can reach, on a small tree of every kind of import and on this one."""

import os
import sys
import time

import pytest

from tests.near import ROOT, Graph, run

FILES = {
  "CONTRIBUTING.md": "| family | dict | test |\n| --- | --- | --- |\n| shape | `SHAPES` | x |\n",
  "jaxmoe/__init__.py": "",
  "jaxmoe/size.py": "def size(): ...",
  "jaxmoe/shapes/__init__.py": """
from jaxmoe.shapes.circle import Circle
from jaxmoe.shapes.square import Square
SHAPES = {"circle": (Circle, Circle()), "square": (Square, Square())}
__all__ = ["SHAPES", "Circle", "Square"]
""",
  "jaxmoe/shapes/circle.py": "class Circle: ...",
  "jaxmoe/shapes/square.py": "from jaxmoe.size import size\nclass Square: size = size",
  "jaxmoe/picture.py": """
from jaxmoe.shapes import SHAPES, Square
class Picture: shape = Square(); known = SHAPES
""",
  "jaxmoe/commands/__init__.py": "",
  "jaxmoe/commands/draw.py": "from jaxmoe.picture import Picture\nPicture()",
  "tests/conftest.py": "import jaxmoe.paint",
  "jaxmoe/paint.py": "",
  "tests/shapes/contract_test.py": "from jaxmoe.shapes import SHAPES\nSHAPES",
  "tests/shapes/square_test.py": "from jaxmoe.shapes import Square\nSquare",
  "tests/shapes/sizes.json": "{}",
  "tests/picture_test.py": "from jaxmoe.picture import Picture\nPicture",
  "tests/key_test.py": "RECIPE = 'tiny:shape=circle'",
  "tests/command_test.py": "def test(here): here('draw', '--shape=x'); open('README.md')",
  "tests/alone_test.py": "import math\nmath",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  root = tmp_path_factory.mktemp("tree")
  for name, text in FILES.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
  return Graph(root)


@pytest.fixture(scope="module")
def whole():
  return Graph()


@pytest.mark.parametrize(
  "changed, tests",
  [
    ("jaxmoe/shapes/circle.py", {"shapes/contract": 2, "key": 3}),
    ("jaxmoe/shapes/square.py", {"shapes/square": 1, "shapes/contract": 2, "picture": 2,
                                 "command": 3}),
    ("jaxmoe/size.py", {"shapes/square": 2, "shapes/contract": 3, "picture": 3, "command": 4}),
    ("jaxmoe/shapes/__init__.py", {"shapes/contract": 1, "picture": 2, "command": 3}),
    ("jaxmoe/commands/draw.py", {"command": 1}),
    ("tests/shapes/sizes.json", {"shapes/contract": 3, "shapes/square": 3}),
    ("README.md", {"command": 3}),
    ("tests/alone_test.py", {"alone": 0}),
    ("jaxmoe/gone.py", {}),
  ],
)  # fmt: skip
def test_tests_are_found_by_what_they_import_and_name(small, changed, tests):
  assert small.reached_by([changed]) == {f"tests/{name}_test.py": at for name, at in tests.items()}


def test_what_a_conftest_imports_reaches_all_tests_below_it(small):
  assert len(small.reached_by(["jaxmoe/paint.py"])) == 6


def test_the_nearest_come_first(small):
  assert list(small.reached_by(["jaxmoe/size.py"]).values()) == [2, 3, 3, 4]


def test_a_component_reaches_its_contract_and_little_else(whole):
  of_router = whole.reached_by(["jaxmoe/moe/routers/assignment.py"])
  assert next(iter(of_router)) == "tests/contracts/routers_test.py"
  assert len(of_router) < len(whole.tests()) / 8
  assert not any(path.startswith(("tests/data/", "tests/checkpoint/")) for path in of_router)


def test_what_every_run_does_reaches_every_test_of_a_command(whole):
  of_step = whole.reached_by(["jaxmoe/train/step.py"])
  assert {"tests/train/step_test.py", "tests/commands/kill_test.py"} <= {*of_step}


TWO = """
import os, signal

def test_first(): assert {first}

def test_last():
  {last}
"""
INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize(
  "first, last, seconds, code",
  [(False, "assert False", -1, 0), (True, INTERRUPT, 600, 0), (False, INTERRUPT, 600, 1)],
  ids=["nothing begins", "an interrupt is no failure", "a failure before it is one"],
)
def test_what_the_time_does_not_allow_is_left_and_fails_nothing(tmp_path, first, last, seconds,
                                                                code):  # fmt: skip
  (tmp_path / "two_test.py").write_text(TWO.format(first=first, last=last))
  command = [
    sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "tests.near_time",
    f"--near_until={time.time() + seconds}", "--rootdir", tmp_path, tmp_path / "two_test.py",
  ]  # fmt: skip
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  assert run(command, env, time.time() + 3600) == code


def test_what_runs_when_the_time_is_over_is_interrupted():
  code = "import time; time.sleep(3600)"
  assert run([sys.executable, "-S", "-c", code], dict(os.environ), time.time() - 1) != 0
