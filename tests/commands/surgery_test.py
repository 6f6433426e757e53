"""`launch.surgery`: a new run, whole or not at all, whose outputs and moments are the old one's."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest

from jaxmoe.checkpoint import open_store
from jaxmoe.checkpoint.orbax_store import OrbaxStore
from jaxmoe.checkpoint.store import read_latest
from jaxmoe.core.config_io import override, to_json
from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.core.layout import one_device
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.recipes.tiny import get_config
from jaxmoe.runs import derived_run
from jaxmoe.train.train_state import StateSpec
from jaxmoe.train.workdir import Workdir

IDS = np.random.default_rng(0).integers(0, 257, (2, 24)).astype(np.int32)
FROZEN = "layers/*/moe/experts/*@0:4"
SCHEDULE = "optimizer/3/count"  # the last link of the chain: the learning rate's


def spec_of(experiment):
  decoder, window = experiment.decoder(), experiment.train.recovery.spike_window
  return StateSpec(decoder, experiment.transform(decoder), one_device(), window)


def state_of(workdir):
  """Returns (step, {canonical name: NumPy array}, record) of the newest checkpoint."""
  like = spec_of(Workdir(workdir).experiment()).abstract()
  step, arrays, record = read_latest(open_store(workdir / "checkpoints"), like, print)
  return step, jax.device_get(arrays), record


def files_of(folder):
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def operate(here, trained, tmp_path):
  """Returns a function that makes `tmp_path / name` of the trained run or another."""

  def run(name, *flags, of=trained):
    result = here("surgery", f"--workdir={of}", f"--out={tmp_path / name}", *flags)
    assert result.code == 0, result
    return tmp_path / name

  return run


@pytest.fixture
def logits(here, tmp_path):
  """Returns a function from a workdir to the logits `launch.score` writes."""

  def run(workdir):
    np.save(tmp_path / "ids.npy", IDS)
    flags = (f"--ids={tmp_path}/ids.npy", f"--out={tmp_path}/out.npz", "--logits")
    result = here("score", f"--workdir={workdir}", *flags)
    assert result.code == 0, result
    with np.load(tmp_path / "out.npz") as arrays:
      return arrays["logits"]

  return run


def test_an_inserted_run_scores_bit_for_bit_as_before_and_its_moments_followed(
  operate, logits, trained
):
  before = files_of(trained)
  new = operate("new", "--insert=2", "--like=3,0")
  assert files_of(trained) == before
  np.testing.assert_array_equal(logits(new), logits(trained))
  (_, old, _), (step, got, record) = state_of(trained), state_of(new)
  assert (step, got["step"], got["recent/count"], record["step"]) == (0, 0, 0, 0)
  assert old.keys() == got.keys()
  grown = {name for name in old if "/moe/experts/" in name}
  assert {name.split("/")[0] for name in grown} == {"params", "optimizer"}
  for name, x in old.items():
    if name in grown:
      np.testing.assert_array_equal(got[name], x[[0, 1, 2, 3, 3, 0]], err_msg=name)
    elif name == SCHEDULE:
      assert (x, got[name]) == (6, 0)
    elif name.startswith(("params/", "optimizer/")):
      np.testing.assert_array_equal(got[name], x, err_msg=name)
  event = json.loads((new / "events.jsonl").read_text())
  assert (event["event"], event["of"], event["step"]) == ("surgery", str(trained), 6)
  assert event["flags"] == {"insert": 2, "like": ["3", "0"]}


@pytest.mark.slow
def test_a_new_run_trains_on_and_what_is_frozen_keeps_every_bit_also_when_resumed(
  operate, here
):
  flags = ("--insert=1", f"--config.optim.frozen={FROZEN},embed/*", "--config.samples.every=0")
  new = operate("new", *flags, "--config.evaluation.every=0")
  _, first, _ = state_of(new)
  for steps in (4, 10):
    more = f"--config.train.num_steps={steps}"
    result = here("train", f"--config={new}/config.json", more, f"--workdir={new}")
    assert result.code == 0, result
  assert "going on from step 4" in result.out
  step, last, _ = state_of(new)
  assert step == 10
  for name, x in last.items():
    if "/moe/experts/" in name:
      np.testing.assert_array_equal(x[:4], first[name][:4], err_msg=name)
    elif "embed/table" in name:
      np.testing.assert_array_equal(x, first[name], err_msg=name)
    elif name.startswith("params/"):
      assert (x != first[name]).any(), name
  events = [json.loads(line)["event"] for line in (new / "events.jsonl").read_text().splitlines()]
  assert events[0] == "surgery" and events.count("start") == 1 and events.count("resume") == 1
  lines = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(1, 11))


def test_pruning_keeps_what_a_file_of_counts_says_layer_by_layer(operate, trained, tmp_path):
  (tmp_path / "usage.json").write_text("[[5, 1, 1, 7], [0, 3, 4, 1]]")
  new = operate("new", "--prune_to=2", f"--usage={tmp_path}/usage.json")
  (_, old, _), (_, got, _) = state_of(trained), state_of(new)
  for depth, kept in ((0, [0, 3]), (1, [1, 2])):
    for leaf, axis in (("experts/down", 0), ("experts/gate_up", 0), ("router/gate/weight", 1)):
      ends = f"layers/{depth}/moe/{leaf}"
      names = [name for name in old if name.endswith(ends)]
      assert len(names) == 3  # the weight and two moments
      for name in names:
        np.testing.assert_array_equal(got[name], old[name].take(kept, axis), err_msg=name)


@pytest.mark.slow
def test_pruning_by_counts_of_training_and_held_out_batches_keeps_the_most_used(
  operate, trained, tmp_path
):
  # Every count of the run's own metrics is a file of counts too.
  kept = {}
  for name, flags in {
    "counted": ("--count_on=6",), "held out": ("--count_on=2", "--held_out"),
    "metrics": (f"--usage={trained}/metrics.jsonl",),
  }.items():  # fmt: skip
    _, got, _ = state_of(operate(name, "--prune_to=2", *flags))
    kept[name] = got["params/layers/0/moe/experts/down"]
    assert len(kept[name]) == 2
  lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
  load = np.mean([line["layers"]["0"]["load"] for line in lines], axis=0)
  _, old, _ = state_of(trained)
  best = sorted(np.argsort(-load, kind="stable")[:2])
  np.testing.assert_array_equal(kept["metrics"], old["params/layers/0/moe/experts/down"][best])


@pytest.mark.slow
def test_opened_and_cloned_runs_are_written_and_a_cloned_one_scores_as_before(
  operate, logits, trained
):
  closed = operate("closed", "--insert=1")
  opened = operate("opened", "--open", "--reset_moments", of=closed)
  _, got, _ = state_of(opened)
  assert got["params/layers/1/moe/router/gate/weight"].shape == (32, 5)
  moments = [x for name, x in got.items() if name.startswith("optimizer/")]
  assert not any(x.any() for x in moments)
  # Twice as many terms a token, of half the weight.
  cloned = logits(operate("cloned", "--clone=2"))
  np.testing.assert_allclose(cloned, logits(trained), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_upcycled_run_scores_as_the_dense_one(operate, logits, trained, tmp_path):
  block = BlockConfig(
    SoftmaxAttention(num_heads=2, num_kv_heads=1, head_dim=16), MLPConfig(mlp_dim=16)
  )
  sparse = Workdir(trained).experiment()
  model = TransformerConfig(dim=32, stack=(LayerGroup((block,), 2),))
  dense = derived_run.dataclasses.replace(sparse, model=model)
  workdir = tmp_path / "dense"
  workdir.mkdir()
  (workdir / "config.json").write_text(to_json(dense))
  (workdir / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
  spec, store = spec_of(dense), open_store(workdir / "checkpoints")
  _, _, record = state_of(trained)
  store.write(3, spec.to_arrays(spec.init(4)), record)
  store.close()
  new = operate("new", "--upcycle=4", "--active=3", of=workdir)
  np.testing.assert_allclose(logits(new), logits(workdir), rtol=1e-4, atol=1e-5)
  assert Workdir(new).experiment().model.moe_records()[0].num_active == 3


# What goes wrong.

NO_COUNTS = "--usage=/nowhere.json"


@pytest.mark.parametrize(
  "flags, words",
  [
    (("--upcycle=2", "--drop=0.5"), ("--reset_moments",)),
    (("--upcycle=2", "--noise=-1"), ("noise must not be negative",)),
    (("--clone=2", "--drop=0.5"), ("--drop does not go with --clone",)),
    ((), ("give one of --insert, --open",)),
    (("--insert=1", "--clone=2"), ("2 given",)),
    (("--insert=1", "--active=2"), ("--active does not go with --insert",)),
    (("--insert=1", "--like=a"), ("--like", "'a'")),
    (("--insert=1", "--like=9"), ("below 4",)),
    (("--insert=0",), ("at least one",)),
    (("--open",), ("insert first",)),
    (("--clone=1",), ("at least 2",)),
    (("--upcycle=4",), ("no block has a dense",)),
    (("--prune_to=2",), ("one of --usage=FILE and --count_on",)),
    (("--prune_to=2", "--count_on=2", NO_COUNTS), ("one of --usage",)),
    (("--prune_to=2", NO_COUNTS), ("/nowhere.json: cannot be read",)),
    (("--prune_to=9", "--count_on=1"), ("between 1 and 4",)),
    (("--insert=1", "--config.model.dim=16"), ("change the shapes of parameters",)),
    (("--insert=1", "--config.nowhere=1"), ("nowhere",)),
    (("--insert=1", "--config.optim.frozen=layers/9/*"), ("names no parameter",)),
    (("--insert=1", "--config=nowhere.json"), ("nowhere.json: cannot be read",)),
  ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_written(
  flags, words, here, trained, tmp_path
):
  result = here("surgery", f"--workdir={trained}", f"--out={tmp_path}/new", *flags)
  assert result.code == 2, result
  assert len(result.err.splitlines()) == 1 and all(word in result.err for word in words), result
  assert list(tmp_path.iterdir()) == []


def test_a_missing_or_taken_folder_and_another_optimizer_are_refused(
  here, trained, tiny, tmp_path
):
  (tmp_path / "taken").mkdir()
  out = f"--out={tmp_path}/new"
  for flags, words, code in (
    ((f"--workdir={trained}",), "--out is missing", 2),
    ((f"--workdir={trained}", f"--out={tmp_path}/taken"), "is there already", 2),
    ((out,), "--workdir is missing", 2),
    ((f"--workdir={tmp_path}/none", out), "no run here", 4),
    ((f"--workdir={trained}", out, f"{tiny}:optimizer=lion"), "--reset_moments", 2),
  ):
    result = here("surgery", "--insert=1", *flags)
    assert (result.code, len(result.err.splitlines())) == (code, 1), result
    assert words in result.err
  assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_fairness_that_begins_or_compares_something_else_needs_the_optimizer_anew():
  old = get_config(router="tree")
  loads, nodes = (
    override(old, [("optim.fairness.weight", "0.1"), ("optim.fairness.target", target)])
    for target in ("load", "parity")
  )
  harder = override(nodes, [("optim.fairness.weight", "0.2")])
  derived_run.check_moments(nodes, harder, False)
  for before, after in ((old, nodes), (nodes, old), (nodes, loads)):
    derived_run.check_moments(before, after, True)
    with pytest.raises(InputError, match="--reset_moments"):
      derived_run.check_moments(before, after, False)


def test_the_folder_is_moved_to_its_place_whole_and_not_filled_there(
  here, trained, tmp_path, monkeypatch
):
  moved, rename = [], pathlib.Path.rename

  def watched(path, target):
    if pathlib.Path(target) == tmp_path / "new":
      moved.append((sorted(item.name for item in path.iterdir()), os.path.lexists(target)))
    return rename(path, target)

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "rename", watched)
    result = here("surgery", f"--workdir={trained}", f"--out={tmp_path}/new", "--insert=1")
  assert result.code == 0, result
  assert moved == [(sorted(item.name for item in (tmp_path / "new").iterdir()), False)]


@pytest.mark.parametrize("method, error, code", [
  ("wait", CheckpointError("no room"), 4), ("wait", KeyboardInterrupt(), 130),
  ("write", OSError(28, "No space left"), 2),
])  # fmt: skip
def test_a_write_that_fails_half_way_leaves_nothing(
  method, error, code, here, trained, tmp_path, monkeypatch
):
  seen = []

  def fail(store, *arguments):
    seen.append(sorted(path.name for path in tmp_path.iterdir()))
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(OrbaxStore, method, fail)
    result = here("surgery", f"--workdir={trained}", f"--out={tmp_path}/new", "--insert=1")
  assert result.code == code, result
  assert seen and seen[0] and "new" not in seen[0]  # it was half written, under another name
  assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []
