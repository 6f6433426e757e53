"""One word is one thing: words that code was rid of do not come back, and names are told apart.

LEFT holds words that mean another thing to whoever comes from elsewhere, or nothing; what the field
says stands beside each. Looked at are names that we give: modules, classes, functions, arguments,
fields and attributes. A word that is right somewhere, where it means another thing, stands in ELSE.
"""

import ast
import collections
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LEFT = {
  "Ahead": "PrefetchThread", "Alone": "NoReduction", "AnyAsked": "any_process", "Around":
  "RunOptions", "Bound": "BoundParam", "Choice": "Selection", "Contiguous": "KVCache", "Copied":
  "Replicated", "Crew": "ProcessGroup", "Cut": "BatchSpec", "DataWatch": "LoaderCallbacks", "Drawn":
  "Trainer", "Entry": "RawExample", "Flow": "Dataflow, ParallelContext", "Form": "TensorLayout",
  "Found": "ExpertOutputs", "Fresh": "NoCache", "Gathers": "ParamGatherer", "Good": "ValidExample",
  "Harm": "Trainer", "Heads": "AttentionBase", "Job": "Trainer", "Journal": "RunLog", "Label":
  "Manifest", "Lane": "DomainStream", "Later": "LazyArray", "Leaf": "ParamMapping", "Ledger":
  "WallClock", "Made": "Activation", "MeshWays": "MeshContext", "Mover": "TokenTransport",
  "Narrator": "ConsoleProgress", "OnlineParity": "OnlineFairness", "Outcome": "RunResult", "Part":
  "MixturePart, ExpertGroup, VocabShard", "Parts": "Trainer", "Piece": "TensorSlice", "Race":
  "Benchmark", "Rates": "Trainer", "Recent": "SpikeWindow", "Reduction": "ReduceScatter",
  "Reference": "StepTotals", "Remote": "WorkerClient, RemoteExperts", "Said": "UntrustedStr",
  "Samples": "RouterStatistics", "Seen": "RouterInputs", "Segment": "LayerGroup", "Site":
  "DispatchContext", "Source": "LoadedState", "Summing": "GradientReducer", "Target": "ExportSpec",
  "Term": "AuxLoss", "ToldError": "UserFacingError", "Trained": "Run", "Watch": "Observers", "Ways":
  "ParallelContext", "Whole": "StepTotals", "Wishes": "ImportOptions", "Words": "IndexNames",
  "arrive": "gather_params", "by_group": "depends_on_shard", "by_row": "per_sequence", "check_own":
  "check_same_run", "closed": "num_inactive", "crew": "group", "flaw": "error", "harmless":
  "step_ok", "journal": "log", "ledger": "clock", "max_copy_gib": "max_replicated_gib", "narrator":
  "console", "needs_whole": "needs_step_totals", "num_idle": "num_zero_compute", "num_open":
  "num_routable", "of_domains": "domain_sums", "of_first": "broadcast", "over_tensor":
  "psum_tensor", "peers": "multihost", "pressure": "adaptive_coefficient", "reweigh":
  "adjust_weights", "seal": "to_json", "splits": "layer_groups", "tell": "message", "told":
  "message", "ways": "parallel", "weigh": "combine_weights",
}  # fmt: skip
IN = {
  "jaxmoe/core/parallel_context.py": "enter leave own split join total copies num_groups",
  "jaxmoe/parallel/mesh_context.py": "enter leave own split join total copies num_groups",
  "jaxmoe/core/multihost.py": "together first same several",
  "jaxmoe/moe/experts/*.py": "enter leave hidden",
  "jaxmoe/moe/expert_outputs.py": "parts whole shares",
  "jaxmoe/moe/routers/*.py": "choose best given carry hidden",
  "jaxmoe/moe/*.py": "hidden given carry",
  "jaxmoe/core/tokens.py": "given record",
  "jaxmoe/models/attention*.py": "turn remember finish",
  "jaxmoe/models/stack.py": "segment ahead keep outside arrive",
  "jaxmoe/models/transformer.py": "segment ahead keep outside",
  "jaxmoe/moe/dispatch/*.py": "swap room",
  "jaxmoe/models/cache.py": "room remember",
  "jaxmoe/train/re*.py": "begin",
  "jaxmoe/train/tr*.py": "begin ahead around parts drawn rates",
  "jaxmoe/train/train_state.py": "first",
}
"""Words that are good ones elsewhere, by the files in which they meant something else."""
ELSE = {
  "Choice": {"jaxmoe/core/backends.py": "which back end computes an operation, and why"},
  "Samples": {"jaxmoe/train/experiment.py": "texts that a run writes at prompts"},
  "Source": {"jaxmoe/data/raw_example.py": "what raw examples are read from"},
  "Target": {"jaxmoe/ops/soft_tree.py": "which of two values of a tree are compared"},
  "closed": {"jaxmoe/parallel/jaxpr_interpreter.py": "a jaxpr with its constants"},
}
FILES = [
  "core/hlo", "core/groups", "core/products", "core/visits", "core/lowered", "core/inspection",
  "core/ways", "core/peers", "core/weights", "core/names", "core/parameters", "core/recipe",
  "parallel/ways", "data/ahead", "data/remote", "data/frames", "data/said", "data/template",
  "data/chat", "data/watch", "data/sources/found", "data/sources/columns", "data/sources/record",
  "checkpoint/label", "checkpoint/streamed", "models/heads", "models/stream",
  "models/binary_linear", "models/pretrained/keys", "models/pretrained/ropes",
  "models/pretrained/leaves", "models/pretrained/tensors", "models/pretrained/shards",
  "models/pretrained/settings", "models/pretrained/folder", "moe/routers/gate",
  "moe/routers/adaptive", "moe/experts/duo", "moe/experts/primitives", "moe/experts/shift",
  "moe/experts/networks", "optim/online_parity", "optim/state", "train/choices", "train/ledger",
  "train/trace", "train/routing", "train/usage", "train/fit", "train/copies", "train/watch",
  "train/parts", "train/program", "train/spread", "train/loop", "train/session", "report/buckets",
  "search",
]  # fmt: skip
QUESTIONS = ("What", "How", "Who", "Where", "All")


def modules(*packages):
  """Yields (path below the root, tree) of all files of packages."""
  for package in packages:
    for path in sorted((ROOT / package).rglob("*.py")):
      yield path.relative_to(ROOT), ast.parse(path.read_text())


def given(tree):
  """Yields (name, line) of what a module names: classes, functions, arguments, attributes."""
  for node in ast.walk(tree):
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      yield node.name, node.lineno
    elif isinstance(node, ast.arg):
      yield node.arg, node.lineno
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      yield node.id, node.lineno
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
      yield node.attr, node.lineno


def test_no_word_that_was_left_is_back():
  back = [
    f"{path}:{line}: {name} is {LEFT[name]}"
    for path, tree in modules("jaxmoe", "launch")
    for name, line in given(tree)
    if name in LEFT and str(path) not in ELSE.get(name, {})
  ]
  assert not back, "\n".join(back)


@pytest.mark.parametrize("pattern", IN)
def test_a_word_that_meant_something_else_in_a_file_is_not_back_there(pattern):
  paths = sorted(ROOT.glob(pattern))
  assert paths, f"{pattern} is gone: so are its words"
  back = [
    f"{path.name}: {name}"
    for path in paths
    for node in ast.walk(ast.parse(path.read_text()))
    for name in named_by(node)
    if name in IN[pattern].split()
  ]
  assert not back, back


def named_by(node):
  """Returns the names of what is defined by a node for others: functions, arguments and fields."""
  if isinstance(node, ast.FunctionDef):
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [node.name, *(argument.arg for argument in arguments)]
  if isinstance(node, ast.ClassDef):
    fields = (one.target for one in node.body if isinstance(one, ast.AnnAssign))
    return [target.id for target in fields if isinstance(target, ast.Name)]
  return []


def test_no_exception_stands_for_nothing():
  named = {str(path): {name for name, _ in given(tree)} for path, tree in modules("jaxmoe")}
  for word, places in ELSE.items():
    for path, reason in places.items():
      assert word in named[path] and reason, (word, path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_has_another_name_is_not_back(name):
  path = ROOT / "jaxmoe" / name
  assert not path.with_suffix(".py").exists() and not (path / "__init__.py").exists()


def test_few_classes_and_files_have_one_name():
  classes, files = collections.Counter(), collections.Counter()
  for path, tree in modules("jaxmoe"):
    classes.update(node.name for node in tree.body if isinstance(node, ast.ClassDef))
    back_end = "BACKENDS" in (ROOT / path.parent / "__init__.py").read_text()
    if not back_end and path.parts[1] != "commands" and path.name != "__init__.py":
      files[path.name] += 1
  assert len(twice := [name for name, times in classes.items() if times > 1]) <= 3, twice
  assert len(twice := [name for name, times in files.items() if times > 1]) <= 6, twice


def test_what_a_module_is_stands_first_in_its_text():
  asking = [
    str(path)
    for path, tree in modules("jaxmoe", "launch")
    if (ast.get_docstring(tree) or "?").split()[0].rstrip(",:") in (*QUESTIONS, "?")
  ]
  assert not asking, "\n".join(asking)


def test_the_glossary_says_where_each_thing_is():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  table = text.partition("## Glossary")[2].partition("\n## ")[0]
  rows = [row.split("|")[1:4] for row in table.splitlines() if row.startswith("| ")][2:]
  assert 25 < len(rows) < 45
  for term, _, where in rows:
    assert re.search(r"`[\w/.]+`|table above", where), term
    for names, path in re.findall(r"((?:`\w+`(?:, )?)+) in `([\w/.]+)`", where):
      there = (ROOT / "jaxmoe" / path).read_text()
      for name in re.findall(r"`(\w+)`", names):
        assert re.search(rf"\b{name}\b", there), (term, name, path)
    for path in re.findall(r"`([a-z_]+/[\w/.]*)`", where):
      assert (ROOT / "jaxmoe" / path).exists() or (ROOT / path).exists(), (term, path)
