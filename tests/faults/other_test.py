"""A workdir or a checkpoint of another run is refused with the differences, and nothing changes."""

import shutil

import pytest

from tests.faults import files

FFN = "model.stack.0.pattern.0.ffn"
CHANGES = {
  "model": {
    "model.dim": 48, "model.stack.0.repeats": 3, f"{FFN}.num_experts": 8, f"{FFN}.num_active": 1,
    f"{FFN}.experts.mlp_dim": 24, "model.stack.0.pattern.0.attention.num_heads": 4,
  },
  "data": {
    "data.seq_len": 32, "data.parts.0.weight": 2.0, "data.parts.1.source.num_documents": 300,
    "data.parts.2.source.size": 5, "data.held_out": 0.1, "train.seed": 1, "train.batch_size": 8,
  },
}


@pytest.fixture(scope="module")
def from_files(break_off, tmp_path_factory):
  """Returns the files of a run that reads its data and its tokenizer from files, and the run."""
  made = files.Files(tmp_path_factory.mktemp("files"))
  return made, break_off(recipe=made.folder / "recipe.py")


@pytest.fixture(scope="module")
def wide(break_off):
  """Returns the workdir of a wider model that was broken off."""
  return break_off(changes={"model.dim": 48})


def refused(case, *words, **options):
  """The run ends with 2 and one line with the difference, and changes no file."""
  before = snapshot(case.workdir)
  ended = case.run(**options)
  assert ended.code == 2, ended
  assert len(ended.err.splitlines()) == 1 and ended.err.startswith("error: "), ended.err
  for word in (" -> ", "use another workdir", *words):
    assert word in ended.err
  assert snapshot(case.workdir) == before
  case.end_as_stated()


def snapshot(folder):
  return {
    str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
  }


def other_recipe(case, what, broken_off):
  """Runs with another recipe in the workdir."""
  case.copy(broken_off)
  path, value = case.rng.choice(list(CHANGES[what].items()))
  refused(case, path, str(value), changes={path: value})


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(case, broken_off, wide, seed):
  rng = case.begin("other_model", seed)
  if seed % 2:
    other_recipe(case, "model", broken_off)
    return
  case.copy(broken_off)
  for step in rng.choice(((2, 4), (4,))):
    place = f"checkpoints/{step}"
    shutil.rmtree(case.workdir / place)
    shutil.copytree(wide / place, case.workdir / place)
  refused(case, "model.dim", "48", "32")


@pytest.mark.slow
def test_other_data_is_refused(case, broken_off, from_files, seed):
  rng = case.begin("other_data", seed)
  if seed % 2:
    other_recipe(case, "data", broken_off)
    return
  made, workdir = from_files
  case.copy(workdir)
  undo = made.change_texts(rng)
  try:
    refused(case, "digest", recipe=made.folder / "recipe.py")
  finally:
    undo()


@pytest.mark.slow
def test_another_tokenizer_is_refused(case, from_files, seed):
  rng = case.begin("other_tokenizer", seed)
  made, workdir = from_files
  case.copy(workdir)
  recipe = made.folder / "recipe.py"
  if seed % 2:
    kind = rng.choice(("bpe", "bytes"))
    refused(case, "data.tokenizer", recipe=f"{recipe}:tokenizer={kind}")
    return
  made.train_tokenizer(rng.randint(1, 10**6))
  try:
    refused(case, "tokenizer", recipe=recipe)
  finally:
    made.train_tokenizer(0)
