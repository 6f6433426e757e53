"""A table of cells ages with all that its numbers depend on."""

import ast
import pathlib

import jaxmoe
from jaxmoe.parity import results

ROOT = pathlib.Path(jaxmoe.__file__).parents[1]
BESIDE = {
  "core/config_io.py": "recipes as files",
  "core/errors.py": "texts",
  "core/measured.py": "races on devices that are no CPU",
  "core/moved.py": "recipes as files",
  "core/output.py": "files",
  "core/renamed.py": "recipes as files",
  "data": "the batch of a cell is drawn in parity/fixture.py",
  "parallel/__init__.py": "names alone",
  "parallel/automatic.py": "the layout of another task, which no cell has",
  "parallel/dataflow.py": "of it", "parallel/dim_factors.py": "of it",
  "parallel/jaxpr_interpreter.py": "of it", "parallel/primitive_rules.py": "of it",
  "parallel/idle.py": "a line of text",
  "parallel/replication.py": "what is refused",
  "train/context_rules.py": "what is refused",
  "train/divisibility.py": "what is refused",
  "train/kernels.py": "which back ends a recipe names; a cell names none",
  "train/experiment.py": "the record of a run, of which a cell has parts",
}  # fmt: skip
"""What cells import, and their numbers do not depend on."""


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module.startswith("jaxmoe"):
      for name in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]:
        file = ROOT / name.replace(".", "/")
        yield from (x for x in (file.with_suffix(".py"), file / "__init__.py") if x.is_file())


def reached(path):
  seen, todo = set(), [path]
  while todo:
    if (path := todo.pop()) not in seen:
      seen.add(path)
      todo += imports(path)
  return {path.relative_to(ROOT / "jaxmoe") for path in seen}


def test_what_numbers_of_cells_depend_on_is_in_their_digest():
  found = reached(ROOT / "jaxmoe/parity/cell_errors.py")
  assert pathlib.Path("ops/norm.py") in found
  left = {
    str(path) for path in found
    if not any(path.match(one) or path.parts[0] == one for one in results._SOURCES)
  }  # fmt: skip
  left -= {"__init__.py"} | {path for path in left if path.endswith("core/__init__.py")}
  known = {path for path in left if path in BESIDE or path.split("/")[0] in BESIDE}
  assert left == known
  assert all(any(path == one or path.startswith(one + "/") for path in left) for one in BESIDE)
