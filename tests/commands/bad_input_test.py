"""What a person can get wrong ends in one line that helps, and changes nothing on the disk."""

import contextlib
import fcntl
import gzip
import json
import os
import shutil
import string

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmoe.commands.process import run_flags
from jaxmoe.core.config_io import to_json, to_plain
from jaxmoe.core.errors import CheckpointError, DropError, InputError, NotFiniteError
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.routing_record import digests_of, write_routing

COMMANDS = ("train", "evaluate", "generate", "score")
FFN = "model.stack.0.pattern.0.ffn"
ATTENTION = "model.stack.0.pattern.0.attention"
SOURCE = "data.parts.0.source"


def snapshot(folder):
  """Returns {path: content} of everything below a folder, links not followed."""
  return {
    str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
  }


def assert_refused(result, *words, code=2):
  """The command ended with `code` and one line on standard error that holds `words`."""
  assert result.code == code, result
  lines = result.err.splitlines()
  assert len(lines) == 1, result.err
  assert lines[0].startswith("error: ")
  assert len(lines[0]) > 30
  for word in words:
    assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


@pytest.fixture
def refuses(here, tmp_path, compiles):
  """Returns a function that runs a command which must refuse, compile and change nothing."""

  def run(name, *arguments, words=(), code=2):
    before, lowered = snapshot(tmp_path), len(compiles)
    result = here(name, *arguments)
    assert_refused(result, *words, code=code)
    assert snapshot(tmp_path) == before
    assert compiles[lowered:] == []
    return result

  return run


@pytest.fixture
def untrained(tmp_path, tiny, here):
  """Returns a workdir as a run leaves it that was killed before its first checkpoint."""
  workdir = tmp_path / "untrained"
  workdir.mkdir()
  (workdir / "config.json").write_text(to_json(load_recipe(tiny.removeprefix("--config="), [])))
  (workdir / "tokenizer.json").write_text('{"kind": "bytes"}')
  (workdir / "lock").touch()
  return workdir


@pytest.fixture
def shallow(untrained):
  """Returns a workdir that looks trained; reading its checkpoint would fail with exit 4."""
  (untrained / "checkpoints" / "4").mkdir(parents=True)
  return untrained


@pytest.fixture
def save_ids(tmp_path):
  """Returns a function that writes ids and returns the two flags of launch.score."""

  def save(ids, **options):
    path = tmp_path / "ids.npy"
    if isinstance(ids, bytes):
      path.write_bytes(ids)
    else:
      np.save(path, ids, **options)
    return (f"--ids={path}", f"--out={tmp_path}/scores.npz")

  return save


# Flags.


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_is_refused(refuses, name):
  refuses(name, "--wrokdir=x", words=("wrokdir", "Did you mean: workdir", "--help"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_stray_argument_is_refused(refuses, name):
  refuses(name, "--workdir=x", "stray", words=("'stray'", "--help"))


@pytest.mark.parametrize("name", ("evaluate", "generate", "score"))
def test_an_override_is_refused_where_nothing_is_trained(refuses, name):
  refuses(name, "--config.train.num_steps=3", words=("config.train.num_steps",))


@pytest.mark.parametrize("workdir", ((), ("--workdir=",)))
def test_a_missing_workdir_flag_is_refused(refuses, tiny, save_ids, workdir):
  for name, arguments in (
    ("train", (tiny,)),
    ("evaluate", ()),
    ("generate", ("--prompt=a",)),
    ("score", save_ids(np.zeros((1, 4), np.int32))),
  ):
    refuses(name, *arguments, *workdir, words=("--workdir is missing", "runs/"))


def test_a_missing_config_flag_is_refused(refuses, tmp_path):
  refuses("train", f"--workdir={tmp_path}/w", words=("--config is missing", "configs/tiny.py"))


# Recipes.


def test_devices_that_would_hold_the_same_large_activation_are_refused(
  here, compiles, tiny, tmp_path
):
  before, lowered = snapshot(tmp_path), len(compiles)
  result = here(
    "train", tiny, f"--workdir={tmp_path}/w", "--config.parallel.tensor=2", "--allow_unproven",
    "--config.parallel.max_replicated_gib=1e-6",
  )  # fmt: skip
  assert_refused(result, "each of 2 devices would hold the same activation", "max_replicated_gib")
  assert snapshot(tmp_path) == before
  assert set(compiles[lowered:]) <= {"jit(stage)", "jit(_threefry_seed)"}  # a key, for shapes


@pytest.mark.parametrize(
  "path", ["nowhere.py", "configs", "", "a" * 300 + ".py", "configs/tiny.py/x"]
)
def test_a_recipe_that_is_not_there_is_refused(refuses, tmp_path, path):
  words = ("--config", "configs/tiny.py")
  refuses("train", f"--config={path}", f"--workdir={tmp_path}/w", words=words)


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ("x = 1", ("no get_config()",)),
    ("get_config = 3", ("no get_config()",)),
    ("\nx = (", (":2", "SyntaxError")),
    ("import notthere", (":1", "No module named 'notthere'")),
    ("def get_config():\n  return [][1]", (":2", "IndexError")),
    ("def get_config(size): return size", ("missing 1 required", "'size'")),
    ("def get_config(): pass", ("must return an Experiment", "NoneType")),
    ("raise SystemExit(0)", (":1", "SystemExit")),
  ],
)
def test_a_recipe_that_does_not_work_is_refused_with_its_line(refuses, tmp_path, content, words):
  path = tmp_path / "mine.py"
  path.write_text(content + "\n")
  words = (f"--config={path}", *words)
  refuses("train", f"--config={path}", f"--workdir={tmp_path}/w", words=words)


def test_a_file_that_is_not_python_is_refused(refuses, tmp_path):
  path = tmp_path / "mine.yaml"
  path.touch()
  refuses("train", f"--config={path}", f"--workdir={tmp_path}/w", words=(str(path), "Python"))


@pytest.mark.parametrize(
  ("names", "words"),
  [
    ("rooter=topk", ("'rooter'", "did you mean 'router'")),
    ("router=tpok", ("'tpok'", "did you mean 'topk'", "router")),
    ("dispatch=nothing", ("'nothing'", "known: capacity, ")),
    ("router", ("name=value", "'router'")),
    ("=topk", ("unknown name ''",)),
    ("router=topk,router=topk", ("given twice",)),
  ],
)
def test_an_unknown_name_in_the_config_argument_is_refused(refuses, tiny, tmp_path, names, words):
  refuses("train", f"{tiny}:{names}", f"--workdir={tmp_path}/w", words=words)


@pytest.mark.parametrize(
  ("annotation", "value", "words"),
  [
    ("int", "many", ("expected int", "'many'")),
    ("float", "", ("expected float",)),
    ("bool", "yes", ("expected true or false",)),
    ("list", "3", ("cannot be set here",)),
    ("'int | None'", "3", ("cannot be set here",)),
  ],
)
def test_a_keyword_of_another_type_is_refused(
  refuses, tmp_path, annotation, value, words
):
  path = tmp_path / "mine.py"
  path.write_text(f"def get_config(size: {annotation} = None): return None\n")
  words = (f"{path}:size", *words)
  refuses("train", f"--config={path}:size={value}", f"--workdir={tmp_path}/w", words=words)


# Fields.


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ("train.num_stps=3", ("config.train", "'num_stps'", "did you mean 'num_steps'")),
    ("trane.num_steps=3", ("'trane'", "did you mean 'train'")),
    ("=3", ("unknown field",)),
    ("train=3", ("config.train", "component")),
    ("train.num_steps.more=3", ("config.train.num_steps", "'more'")),
    ("model.stack.1.repeats=3", ("config.model.stack", "0 to 0", "'1'")),
    ("model.stack.-1.repeats=3", ("config.model.stack", "'-1'")),
    ("train.num_steps", ("expected --config.FIELD=VALUE",)),
  ],
)
def test_an_unknown_field_is_refused(refuses, tiny, tmp_path, change, words):
  refuses("train", tiny, f"--workdir={tmp_path}/w", f"--config.{change}", words=words)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ("train.num_steps=ten", ("config.train.num_steps", "expected int", "'ten'")),
    ("train.num_steps=1.5", ("config.train.num_steps", "expected int")),
    ("train.num_steps=", ("config.train.num_steps", "expected int", "''")),
    ("train.num_steps=none", ("config.train.num_steps", "expected int")),
    ("train.num_steps=" + "9" * 5000, ("config.train.num_steps", "expected int")),
    ("optim.learning_rate=fast", ("config.optim.learning_rate", "expected float")),
    ("optim.learning_rate=nan", ("config.optim.learning_rate", "finite")),
    ("optim.learning_rate=1e999", ("config.optim.learning_rate", "finite")),
    ("samples.temperature=nan", ("config.samples.temperature", "finite")),
    ("model.scan=maybe", ("config.model.scan", "expected bool")),
    ("model.dtype=float16", ("config.model.dtype", "'float16'", "bfloat16")),
    (f"{SOURCE}.task=copi", ("config." + SOURCE, "'copi'", "did you mean 'copy'")),
  ],
)
def test_a_value_of_another_type_is_refused(refuses, tiny, tmp_path, change, words):
  refuses("train", tiny, f"--workdir={tmp_path}/w", f"--config.{change}", words=words)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ("train.num_steps=-1", ("config.train", "num_steps=-1", "at least 1")),
    ("train.batch_size=0", ("config.train", "batch_size=0")),
    ("train.seed=-1", ("config.train", "seed", "-1")),
    ("train.seed=4294967296", ("config.train", "seed", "2**32")),
    ("train.max_skips=-1", ("config.train", "max_skips")),
    ("train.keep=0", ("config.train", "keep=0")),
    ("optim.learning_rate=-1", ("config.optim", "learning_rate=-1.0", "above 0")),
    ("optim.clip_norm=0", ("config.optim", "clip_norm", "none")),
    ("optim.schedule.warmup_steps=-3", ("config.optim.schedule", "warmup_steps=-3")),
    ("evaluation.every=-1", ("config.evaluation", "-1")),
    ("samples.top_p=0", ("config.samples", "top_p")),
    ("samples.temperature=-1", ("config.samples", "-1")),
    ("data.seq_len=0", ("config.data", "seq_len")),
    ("data.held_out=1.5", ("config.data", "held_out", "1.5")),
    ("data.parts.0.weight=0", ("config.data.parts.0", "weight")),
    ("model.dim=0", ("config.model", "dim")),
    ("model.stack.0.repeats=0", ("config.model.stack.0", "repeats")),
    (f"{FFN}.experts.mlp_dim=-4", (f"config.{FFN}.experts", "mlp_dim")),
    (f"{FFN}.balance.0.weight=-1", (f"config.{FFN}.balance.0", "weight")),
  ],
)
def test_a_number_out_of_its_range_is_refused(refuses, tiny, tmp_path, change, words):
  refuses("train", tiny, f"--workdir={tmp_path}/w", f"--config.{change}", words=words)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ((f"{FFN}.num_active=5",), (f"config.{FFN}", "num_active=5", "num_experts=4")),
    ((f"{FFN}.num_experts=1",), (f"config.{FFN}", "num_active=2", "num_experts=1")),
    ((f"{ATTENTION}.num_kv_heads=3",), (f"config.{ATTENTION}", "num_heads=2", "num_kv_heads=3")),
    ((f"{ATTENTION}.head_dim=15",), (f"config.{ATTENTION}", "head_dim", "even")),
    (("train.num_micro=3",), ("config.train", "batch_size=4", "num_micro=3")),
    (("train.num_micro=2", "train.batch_size=5"), ("batch_size=5", "num_micro=2")),
    (("train.num_steps=2",), ("warmup_steps=2", "num_steps=2", "lower warmup_steps")),
    (("data.parts.1.source.task=copy",), ("config.data", "same domain", "'copy'")),
    (("train.seed=1", "train.seed=2"), ("config.train.seed", "set twice")),
    (("model.stack=",), ("config.model", "at least one layer group")),
    (("data.parts=",), ("config.data", "parts is empty")),
    ((f"{SOURCE}.num_documents=1",), ("'copy'", "1 documents", "held-out share")),
    (("data.seq_len=4",), ("config.samples.prompts.0", "'copy'", "context is 4")),
    (("samples.prompts=\udcff",), ("config.samples.prompts.0", "UTF-8")),
  ],
)
def test_fields_that_do_not_fit_each_other_are_refused(refuses, tiny, tmp_path, changes, words):
  overrides = [f"--config.{change}" for change in changes]
  refuses("train", tiny, f"--workdir={tmp_path}/w", *overrides, words=words)


def field_paths(record, path="config"):
  """Yields the path of every field of a plain record."""
  yield path
  items = record.items() if isinstance(record, dict) else enumerate(record)
  for name, value in items if isinstance(record, (dict, list)) else ():
    if isinstance(value, (dict, list)):
      yield from field_paths(value, f"{path}.{name}")
    else:
      yield f"{path}.{name}"


_NAMES = st.text(string.ascii_letters + string.digits + "._-é\udcff", max_size=12)
_VALUES = st.one_of(
  st.sampled_from(["", "none", "true", "nan", "-1", "0", "1e999", "[]", "(1,2)", "9" * 30, "a,b"]),
  st.text(max_size=12),
  st.integers().map(str),
  st.floats().map(str),
)


@settings(
  max_examples=150, deadline=None, derandomize=True, database=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_override_ends_in_a_traceback(tiny, data):
  recipe = tiny.removeprefix("--config=")
  known = sorted(set(field_paths(to_plain(load_recipe(recipe, [])))))
  paths = st.one_of(st.sampled_from(known), _NAMES.map(lambda name: f"config.{name}"))
  pairs = data.draw(st.lists(st.tuples(paths, _VALUES), min_size=1, max_size=3))
  with contextlib.suppress(InputError):
    load_recipe(recipe, [f"--{path}={value}" for path, value in pairs])


# Data.


def text_recipe(folder, path, source="TextFiles", more=""):
  """Writes a recipe that reads a source at `path`; returns its config argument."""
  recipe = folder / "mine.py"
  recipe.write_text(
    "from jaxmoe.data.mixture import Data, MixturePart\n"
    "from jaxmoe.data.sources import Jsonl, Stdlib, TextFiles\n"
    "from jaxmoe.train.experiment import Experiment\n"
    f"def get_config(): return Experiment(Data((MixturePart({source}({path!r}{more})),)))\n"
  )
  return f"--config={recipe}"


@pytest.mark.parametrize("where", ["nowhere", "empty", "empty/*.txt"])
def test_a_data_path_with_nothing_at_it_is_refused(refuses, tmp_path, where):
  (tmp_path / "empty").mkdir()
  path = f"{tmp_path}/{where}"
  config = text_recipe(tmp_path, path)
  words = ("'text'", "no .txt file", path, "name a file")
  refuses("train", config, f"--workdir={tmp_path}/w", words=words)


def test_an_empty_data_path_is_refused(refuses, tmp_path):
  config = text_recipe(tmp_path, "x")
  change = f"--config.{SOURCE}.path="
  words = (f"config.{SOURCE}", "path is empty", "folder")
  refuses("train", config, f"--workdir={tmp_path}/w", change, words=words)


def test_too_many_bad_records_are_refused(refuses, tmp_path):
  (tmp_path / "texts").mkdir()
  for i in range(4):
    (tmp_path / "texts" / f"{i}.txt").write_bytes(b"\xff" if i else b"text")
  config = text_recipe(tmp_path, f"{tmp_path}/texts")
  words = ("3 of 4 records", "UTF-8", "max_bad_share")
  refuses("train", config, f"--workdir={tmp_path}/w", words=words)


def test_a_file_of_records_that_ends_early_is_refused_by_name(refuses, tmp_path):
  (tmp_path / "lines").mkdir()
  whole = gzip.compress(b'{"text": "a line"}\n' * 9)
  for i in range(200):
    (tmp_path / "lines" / f"{i}.jsonl.gz").write_bytes(whole[:-9] if i == 7 else whole)
  config = text_recipe(tmp_path, f"{tmp_path}/lines", "Jsonl")
  words = ("'jsonl'", "/lines/7.jsonl.gz: cannot be read", "data.allow_broken_files=true")
  refuses("train", config, f"--workdir={tmp_path}/w", words=words)


def test_a_standard_library_without_sources_is_refused_and_the_way_out_is_named(refuses, tmp_path):
  (tmp_path / "stripped").mkdir()
  config = text_recipe(tmp_path, "code", "Stdlib", more=f", root={str(tmp_path / 'stripped')!r}")
  words = ("'code'", "no .py sources", "stripped", ".txt")
  refuses("train", config, f"--workdir={tmp_path}/w", words=words)


# Workdirs.


@pytest.mark.parametrize("path", ["file/run", "file", "a" * 300])
def test_a_workdir_that_cannot_be_made_is_refused(refuses, tiny, tmp_path, path):
  (tmp_path / "file").touch()
  workdir = f"--workdir={tmp_path}/{path}"
  refuses("train", tiny, workdir, words=(workdir, "choose another folder"))


def test_a_workdir_in_a_file_system_that_takes_no_folders_is_refused(refuses, tiny):
  refuses("train", tiny, "--workdir=/proc/run", words=("--workdir=/proc/run", "choose another"))


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_workdir_without_permission_is_refused(refuses, tiny, tmp_path):
  (tmp_path / "closed").mkdir(mode=0o500)
  refuses("train", tiny, f"--workdir={tmp_path}/closed/run", words=("cannot write to",))


def test_a_workdir_in_use_is_refused(refuses, tiny, untrained):
  with open(untrained / "lock", "ab") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    refuses("train", tiny, f"--workdir={untrained}", words=("in use by another run", "wait"))


def test_another_config_in_the_workdir_is_refused_with_the_difference(refuses, tiny, untrained):
  changes = ("train.seed=3", "model.dim=64", "train.log_every=1")
  overrides = [f"--config.{change}" for change in changes]
  words = ("another config", "train.seed: 0 -> 3", "model.dim: 32 -> 64", "another workdir")
  result = refuses("train", tiny, f"--workdir={untrained}", *overrides, words=words)
  assert "log_every" not in result.err


def test_another_component_in_the_workdir_is_refused_with_the_difference(
  refuses, tiny, untrained
):
  words = (f"{FFN}.dispatch.kind: 'dropless' -> 'dense'",)
  refuses("train", f"{tiny}:dispatch=dense", f"--workdir={untrained}", words=words)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[]", b'{"data": 3}', b"{}"])
def test_a_damaged_config_of_a_run_is_refused(refuses, tiny, untrained, content):
  (untrained / "config.json").write_bytes(content)
  words = (str(untrained / "config.json"),)
  refuses("train", tiny, f"--workdir={untrained}", words=words)
  refuses("generate", "--prompt=a", f"--workdir={untrained}", words=words)


@pytest.mark.parametrize("where", ["nowhere", "empty", "untrained", "a" * 300])
@pytest.mark.parametrize("name", ("evaluate", "generate", "score"))
def test_a_run_without_a_checkpoint_ends_with_exit_4(
  refuses, untrained, save_ids, tmp_path, name, where
):
  (tmp_path / "empty").mkdir()
  arguments = {
    "generate": ("--prompt=a",),
    "score": save_ids(np.zeros((1, 4), np.int32)),
    "evaluate": (),
  }
  word = "no checkpoint yet" if where == "untrained" else "no run here"
  words = (where, word, "train")
  refuses(name, f"--workdir={tmp_path}/{where}", *arguments[name], words=words, code=4)


# Generation.


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ((), ("--prompt is missing",)),
    (("--prompt=",), ("--prompt", "empty")),
    (("--prompt=a", "--prompt="), ("--prompt", "empty")),
    (("--prompt=" + "a" * 63,), ("--prompt='aaa", "64 tokens", "context is 64", "shorten")),
    (("--prompt=a", "--prompt=" + "é" * 40), ("81 tokens",)),
    (("--prompt=\udcff",), ("--prompt", "UTF-8")),
    (("--prompt=a", "--max_tokens=0"), ("max_tokens=0", "at least 1")),
    (("--prompt=a", "--max_tokens=-1"), ("max_tokens=-1",)),
    (("--prompt=a", "--max_tokens=1.5"), ("--max_tokens=1.5",)),
    (("--prompt=a", "--temperature=-0.1"), ("temperature=-0.1", "0 or above")),
    (("--prompt=a", "--temperature=nan"), ("temperature=nan",)),
    (("--prompt=a", "--temperature=inf"), ("temperature=inf",)),
    (("--prompt=a", "--temperature=hot"), ("--temperature=hot",)),
    (("--prompt=a", "--top_p=0"), ("top_p=0", "(0, 1]")),
    (("--prompt=a", "--top_p=1.01"), ("top_p=1.01",)),
    (("--prompt=a", "--top_p=nan"), ("top_p=nan",)),
    (("--prompt=a", "--seed=-1"), ("seed=-1",)),
    (("--prompt=a", "--seed=4294967296"), ("seed=4294967296", "2**32")),
  ],
)
def test_a_prompt_or_a_knob_out_of_bounds_is_refused(refuses, shallow, flags, words):
  refuses("generate", f"--workdir={shallow}", *flags, words=words)


# Scores.


@pytest.mark.parametrize(
  ("ids", "words"),
  [
    (np.full((1, 4), 257, np.int32), ("id 257", "vocabulary of 257")),
    (np.full((2, 4), -1, np.int32), ("id -1", "vocabulary")),
    (np.zeros((1, 4), np.int64), ("int32 array (B, L)", "int64")),
    (np.zeros((1, 4), np.float32), ("int32", "float32")),
    (np.zeros((1, 4), bool), ("int32", "bool")),
    (np.zeros((1, 4), ">i4"), ("int32", ">i4")),
    (np.zeros(4, np.int32), ("(B, L)", "(4,)")),
    (np.zeros((1, 4, 1), np.int32), ("(B, L)", "(1, 4, 1)")),
    (np.zeros((), np.int32), ("(B, L)", "()")),
    (np.zeros((1, 65), np.int32), ("2 to 64", "(1, 65)")),
    (np.zeros((1, 1), np.int32), ("2 to 64", "(1, 1)")),
    (np.zeros((0, 4), np.int32), ("at least one row", "(0, 4)")),
    (np.array([[1, None]], object), ("without pickle",)),
    (b"\x80\x04N.", ("not a plain .npy file",)),
    (b"", ("not a plain .npy file",)),
    (b"\x93NUMPY", ("not a plain .npy file",)),
    (b"PK\x03\x04junk", ("not a plain .npy file",)),
    (b"\x93NUMPY\x01\x00\x10\x00{'descr': (((, }", ("not a plain .npy file",)),
  ],
)
def test_ids_that_cannot_be_scored_are_refused(refuses, shallow, save_ids, ids, words):
  flags = save_ids(ids)
  refuses("score", f"--workdir={shallow}", *flags, words=(flags[0], *words))


def test_an_archive_of_ids_is_refused(refuses, shallow, tmp_path):
  np.savez(tmp_path / "ids.npz", ids=np.zeros((1, 4), np.int32))
  flags = (f"--ids={tmp_path}/ids.npz", f"--out={tmp_path}/scores.npz")
  refuses("score", f"--workdir={shallow}", *flags, words=(flags[0], "archive"))


@pytest.mark.parametrize("path", ["nowhere.npy", ".", "a" * 300])
def test_ids_that_are_not_there_are_refused(refuses, shallow, tmp_path, path):
  flags = (f"--ids={tmp_path}/{path}", f"--out={tmp_path}/scores.npz")
  refuses("score", f"--workdir={shallow}", *flags, words=("--ids=", "cannot be read"))


@pytest.mark.parametrize("path", ["nowhere/x.npz", ".", "ids.npy/x.npz", "a" * 300])
def test_scores_that_could_not_be_written_are_refused(refuses, shallow, save_ids, tmp_path, path):
  ids, _ = save_ids(np.zeros((1, 4), np.int32))
  refuses("score", f"--workdir={shallow}", ids, f"--out={tmp_path}/{path}", words=("--out=",))


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (("--replay_routing=nowhere.npz",), ("--replay_routing=", "cannot be read")),
    (("--replay_routing=README.md",), ("--replay_routing=", "is damaged or no .npz")),
    (("--record_routing=nowhere/x.npz",), ("--record_routing=", "cannot be written")),
    (("--record_routing=a.npz", "--replay_routing=b.npz"), ("give one",)),
  ],
)
def test_a_routing_that_cannot_be_read_or_written_is_refused(
  refuses, shallow, save_ids, flags, words
):
  ids = save_ids(np.zeros((1, 4), np.int32))
  refuses("score", f"--workdir={shallow}", *ids, *flags, words=words)


def test_a_routing_of_other_ids_or_in_place_of_the_scores_is_refused(
  refuses, shallow, save_ids, tmp_path, tiny
):
  ids = save_ids(np.zeros((1, 4), np.int32))
  model = load_recipe(tiny.removeprefix("--config="), []).model
  labels = digests_of(model, 257, np.ones((1, 4), np.int32))
  write_routing(tmp_path / "routing.npz", np.zeros((1, 1, 4, 1), np.int16), labels)
  flags = (f"--workdir={shallow}", *ids)
  replay = f"--replay_routing={tmp_path}/routing.npz"
  refuses("score", *flags, replay, words=(replay, "other token ids"))
  same = f"--record_routing={tmp_path}/scores.npz"
  refuses("score", *flags, same, words=(same, "--out"))


def test_routing_of_a_model_without_experts_is_refused(refuses, shallow, save_ids):
  path = shallow / "config.json"
  plain = json.loads(path.read_text())
  for group in plain["model"]["stack"]:
    for block in group["pattern"]:
      block["ffn"] = {"kind": "mlp", "mlp_dim": 8}
  path.write_text(json.dumps(plain))
  ids = save_ids(np.zeros((1, 4), np.int32))
  flags = (f"--workdir={shallow}", *ids, "--record_routing=x.npz")
  refuses("score", *flags, words=("--record_routing", "no experts"))


@pytest.mark.parametrize("flags", [("--ids=x.npy",), ("--out=x.npz",), ()])
def test_a_missing_flag_of_scores_is_refused(refuses, flags):
  refuses("score", "--workdir=x", *flags, words=("--ids and --out are needed",))


# The process.


def test_the_exit_code_and_the_line_are_those_of_the_process(alone, tiny, tmp_path):
  result = alone("train", tiny, f"--workdir={tmp_path}/w", f"--config.{FFN}.num_active=9")
  assert_refused(result, "num_active=9", "num_experts=4")
  assert result.out == ""
  assert not (tmp_path / "w").exists()


def test_a_run_whose_checkpoints_are_all_damaged_ends_with_exit_4(here, trained, tmp_path):
  workdir = tmp_path / "copy"
  shutil.copytree(trained, workdir)
  for label in workdir.glob("checkpoints/*/label/metadata"):
    label.write_text("{}")
  result = here("generate", f"--workdir={workdir}", "--prompt=a")
  assert result.code == 4
  *warnings, error = result.err.splitlines()
  assert [line.split(" is damaged")[0] for line in warnings] == ["checkpoint 6", "checkpoint 4"]
  assert error.startswith("error: no intact checkpoint")
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "6"]


def test_the_errors_that_end_a_command_are_told_apart_from_defects(here, monkeypatch, tiny):
  def broken(path):
    raise ZeroDivisionError("a defect")

  monkeypatch.setattr(run_flags, "need_workdir", broken)
  with pytest.raises(ZeroDivisionError):
    here("train", tiny, "--workdir=x")
  kinds = (InputError, NotFiniteError, CheckpointError, DropError)
  assert tuple(kind.code for kind in kinds) == (2, 3, 4, 5)
  assert jax.config.jax_numpy_rank_promotion == "raise"


def test_a_run_of_before_is_refused_for_what_was_asked_alone(refuses, untrained, tiny):
  path = untrained / "config.json"
  plain = json.loads(path.read_text())
  plain["optim"]["no_decay"] = ["*scale", "*bias", "embed/*"]
  path.write_text(json.dumps(plain))
  words = ("holds a run of another config (optim.clip_norm: 1.0 -> 2.0)",)
  refuses("train", tiny, "--config.optim.clip_norm=2.0", f"--workdir={untrained}", words=words)
