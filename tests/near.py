"""The tests that a change can reach, nearest first: `make test-near`.

python -m tests.near [--since=main] [--show] [--until=UNIX_S] [--workers=2]

Changed is what differs from where this branch left --since, committed or not. A test file reaches
what it imports, and what that imports. Of a family (the dicts of CONTRIBUTING's table) only tests
that import the dict itself, or name a member by its key, reach every member: models and recipes
that may hold one do not. A test that runs a command by name reaches the command; a file that is no
Python is reached by tests that name it. After --until, four minutes from now less 25 s unless make
says when it began, no further test begins, and how many are left is told; what then still runs is
interrupted at four minutes. What was left or interrupted fails nothing: `make test` runs it.
"""

import argparse
import ast
import collections
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("jaxmoe", "launch", "configs", "experiments", "tests")
TOTAL_S, LAST_S = 240, 25
"""Of all that `make test-near` does, and of those the last tests that begin."""
GRACE_S = 5
"""For an interrupted pytest to say what failed."""
FAR = 3
"""How many imports a test lies away from what it only names."""


class Module:
  """What one file imports and names.

  Attributes:
    name: Dotted.
    path: Below the root.
    imports: {name here: (module, name there, None for the module itself)}.
    dicts: {visible dict: (names used in it, its keys)}.
    alone: Imported names that nothing but visible dicts and `__all__` uses.
    texts: Its texts.
  """

  def __init__(self, root, path, families):
    self.path = path.relative_to(root)
    parts = list(self.path.with_suffix("").parts)
    self.is_package = parts[-1] == "__init__"
    self.name = ".".join(parts[:-1] if self.is_package else parts)
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    self.texts = [node.value for node in nodes
                  if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
    self.imports = {}
    for node in nodes:
      if isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
          self.imports[alias.asname or alias.name] = (node.module, alias.name)
      elif isinstance(node, ast.Import):
        self.imports |= {alias.asname or alias.name: (alias.name, None) for alias in node.names}
    self.dicts, inside = {}, set()
    for node in tree.body:
      targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
      for target in targets:
        if getattr(target, "id", "") in families and isinstance(node.value, ast.Dict):
          held = {one.id for one in ast.walk(node.value) if isinstance(one, ast.Name)}
          keys = {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
          self.dicts[target.id] = (held, keys)
          inside |= {id(one) for one in ast.walk(node.value)}
    used = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in inside}
    held = {name for names, _ in self.dicts.values() for name in names}
    self.alone = {name for name in self.imports
                  if name not in used and (name in held or self.is_package)}  # fmt: skip


class Graph:
  """Who reaches whom. Nodes are modules, and `module:DICT` for a family with all its members."""

  def __init__(self, root=ROOT):
    self.root = root
    table = re.findall(r"^\|[^|]*\|([^|]*)\|", (root / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    families = set(re.findall(r"`([A-Z_]+)`", " ".join(table)))
    paths = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    made = [Module(root, path, families) for path in paths]
    self.modules = {module.name: module for module in made}
    self._edges = {}
    self.commands = {module.name.rpartition(".")[2]: module.name for module in made
                     if module.name.startswith("jaxmoe.commands.")}  # fmt: skip

  def origin(self, module, name):
    """Returns (module, name) of where a name was made that a module gives; (it, None) for one."""
    if f"{module}.{name}" in self.modules:
      return f"{module}.{name}", None
    there = self.modules.get(module)
    if there is None or name not in there.imports or name in there.dicts:
      return module, name
    return self.origin(*there.imports[name])

  def edges(self, node):
    """Returns the nodes that a node reaches at once."""
    if node not in self._edges:
      self._edges[node] = self._found(node)
    return self._edges[node]

  def _found(self, node):
    name, _, family = node.partition(":")
    module = self.modules[name]
    if family:
      return {name} | self._of_names(module, module.dicts[family][0] & {*module.imports}, True)
    is_test = name.startswith("tests.")
    found = self._of_names(module, {*module.imports} - module.alone, is_test)
    if is_test:
      found |= {f"{name}:{family}" for family in module.dicts}
      found |= self._conftests(module) | self._run(module)
    return found - {node}

  def _of_names(self, module, names, is_test):
    found = set()
    for name in names:
      of, what = module.imports[name]
      of, what = (of, None) if what is None else self.origin(of, what)
      there = self.modules.get(of)
      if there is None:
        continue
      found.add(of)
      if is_test:  # of a module in hand any dict may be used
        found |= {f"{of}:{family}" for family in there.dicts if what in (None, family)}
    return found

  def _conftests(self, module):
    folders = module.path.parents
    files = [".".join([*folder.parts, "conftest"]) for folder in folders]
    return {file for file in files if file in self.modules and file != module.name}

  def _run(self, module):
    words = {word for text in module.texts for word in text.split()[:4]}
    words = {word.removeprefix("launch.").removeprefix("jaxmoe.commands.") for word in words}
    return {self.commands[word] for word in words & {*self.commands}}

  def keys(self, modules):
    """Returns the keys under which families have members that are made in these modules."""
    found = set()
    for module in self.modules.values():
      for held, _ in module.dicts.values():
        held = {name for name in held if name in module.imports
                and self.origin(*module.imports[name])[0] in modules}  # fmt: skip
        if held:
          tree = ast.parse((self.root / module.path).read_text())
          pairs = (pair for node in ast.walk(tree) if isinstance(node, ast.Dict)
                   for pair in zip(node.keys, node.values))  # fmt: skip
          found |= {key.value for key, value in pairs if isinstance(key, ast.Constant)
                    and held & {one.id for one in ast.walk(value) if isinstance(one, ast.Name)}}
    return found

  def tests(self):
    """Returns the modules that hold tests."""
    return [name for name in self.modules if name.startswith("tests.") and name.endswith("_test")]

  def naming(self, file):
    """Returns the tests that name a file that is no Python; where none does, those beside it."""
    tests = {test: self.modules[test] for test in self.tests()}
    found = {test for test in tests if any(file.name in text for text in tests[test].texts)}
    folder = pathlib.Path(*file.parts[:-1])
    return found or {test for test, module in tests.items() if module.path.parent == folder}

  def reached_by(self, changed):
    """Returns {test file: how many imports away}, nearest first, for changed paths."""
    paths = {str(module.path): module for module in self.modules.values()}
    modules = {paths[path].name for path in changed if path in paths}
    named = {path: self.naming(pathlib.PurePath(path)) for path in changed if path[-3:] != ".py"}
    keys = [re.compile(rf"\b{re.escape(str(key))}\b") for key in self.keys(modules)]
    found = {}
    for test in self.tests():
      path = self.modules[test].path
      steps = [self._distance(test, modules)]
      if any(key.search(text) for key in keys for text in self.modules[test].texts):
        steps.append(FAR)
      steps += [FAR for name in named if test in named[name]]
      steps = [step for step in steps if step is not None]
      if steps:
        found[str(path)] = min(steps)
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))

  def _distance(self, start, goals):
    seen, queue = {start}, collections.deque([(start, 0)])
    while queue:
      node, steps = queue.popleft()
      if node in goals:
        return steps
      for other in sorted(self.edges(node) - seen):
        seen.add(other)
        queue.append((other, steps + 1))
    return None


def changed_since(name):
  """Returns the paths that differ from where this branch left another, committed or not."""

  def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")

  base = git("merge-base", name, "HEAD")[0].strip()
  there = git("diff", "--name-only", "--no-renames", "-z", base)
  new = git("ls-files", "--others", "--exclude-standard", "-z")
  return sorted({*there, *new} - {""})


def run(command, env, end):
  """Returns the exit code of pytest, which is interrupted where it runs at `end` (unix seconds)."""
  process = subprocess.Popen(command, cwd=ROOT, env=env)
  try:
    return process.wait(max(end - time.time(), 0))
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGINT)
  try:
    return process.wait(GRACE_S)
  except subprocess.TimeoutExpired:  # who starts it in the background may have it ignore interrupts
    process.kill()
    return process.wait()


def main():
  """Runs the tests of the change; returns pytest's exit code, 0 where there are none."""
  parser = argparse.ArgumentParser(prog="python -m tests.near")
  parser.add_argument("--since", default="main", help="The branch or commit that the change is on.")
  parser.add_argument("--show", action="store_true", help="Only names the test files.")
  until = time.time() + TOTAL_S - LAST_S
  parser.add_argument("--until", type=float, default=until, help="After which none is begun.")
  parser.add_argument("--workers", type=int, default=2, help="Processes.")
  asked = parser.parse_args()
  changed = changed_since(asked.since)
  files = Graph().reached_by(changed)
  print(f"{len(changed)} files changed, {len(files)} test files reach them", flush=True)
  if asked.show or not files:
    print("\n".join(f"{steps} {path}" for path, steps in files.items()))
    return 0
  command = [
    sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "tests.near_time",
    f"--near_until={asked.until}", "-n", str(asked.workers), "--dist", "loadfile",
    "--no-loadscope-reorder", *files,
  ]  # fmt: skip
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  return run(command, env, asked.until + LAST_S)


if __name__ == "__main__":
  sys.exit(main())
