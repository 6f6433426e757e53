"""Runs of bfloat16 files train in float32, and every command takes what they leave."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint import LazyArray, open_store
from jaxmoe.core.layout import one_device
from jaxmoe.train.train_state import read_params
from jaxmoe.train.workdir import Workdir
from tests.models.pretrained.checkpoint import write_checkpoint

ROOT = pathlib.Path(__file__).parents[2]
BEFORE = ROOT / "tests" / "launch" / "before" / "bfloat16"
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def params_in(workdir):
  """Returns (step, {canonical name: array}) of a run's newest checkpoint."""
  decoder = Workdir(workdir).experiment().decoder()
  store = open_store(workdir / "checkpoints")
  step, arrays, _ = read_params(store, decoder, one_device(), pytest.fail)
  return step, {name: np.asarray(x) for name, x in arrays.items()}


def events_of(workdir, kind):
  lines = (workdir / "events.jsonl").read_text().splitlines()
  return [event for event in map(json.loads, lines) if event["event"] == kind]


def told(event):
  return {key: value for key, value in event.items() if key not in ("event", "time")}


@pytest.fixture(scope="module")
def went_on(here, tmp_path_factory):
  """A bfloat16 run of before there were masters, gone on from step 4 to 8, and what it printed."""
  workdir = tmp_path_factory.mktemp("masters") / "run"
  shutil.copytree(BEFORE, workdir)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)  # where the recipe finds its text
    patch.setattr("jaxmoe.commands.process.jax_settings.set_up_jax", lambda keep_memory=True: None)
    result = here("train", f"--config={workdir}/config.json", f"--workdir={workdir}")
    assert result.code == 0, result
    again = here("train", f"--config={workdir}/config.json", f"--workdir={workdir}")
    assert again.code == 0, again
  return workdir, result.out + again.out


def test_a_bfloat16_run_of_before_goes_on_with_float32_masters_and_learns(went_on):
  workdir, _ = went_on
  (first, old), (last, new) = params_in(BEFORE), params_in(workdir)
  assert (first, last) == (4, 8)
  assert {x.dtype for name, x in old.items() if "buffers" not in name} == {BF16}
  assert {x.dtype for x in new.values()} == {F32}
  for name, x in new.items():
    if name != "params/embed/table":  # of which rows of absent bytes have no gradient
      assert np.mean(x != np.float32(old[name])) > 0.9, name
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(1, 9))
  assert lines[4].keys() == lines[2].keys()


def test_that_is_told_once(went_on):
  workdir, out = went_on
  (event,) = events_of(workdir, "masters")
  weights = sum(x.size for name, x in params_in(BEFORE)[1].items() if x.dtype == BF16)
  assert told(event) == {"step": 4, "weights": weights, "came": "bfloat16", "kept": "float32"}
  line = f"{weights:,} weights of step 4 are bfloat16; they go on in float32 (optim.master_dtype)"
  assert out.count(line) == 1


def test_experts_inserted_into_a_bfloat16_run_train_in_float32_beside_what_is_frozen(
  here, tmp_path, monkeypatch
):
  monkeypatch.chdir(ROOT)
  new = tmp_path / "new"
  flags = ("--insert=1", "--config.optim.frozen=*/attention/*,*/experts/*@0:4")
  result = here("surgery", f"--workdir={BEFORE}", f"--out={new}", *flags)
  assert result.code == 0, result
  old, arrays = params_in(BEFORE)[1], params_in(new)[1]
  for name, x in arrays.items():
    assert x.dtype == (BF16 if "/attention/" in name else F32), name
    kept = x[:4] if "/experts/" in name else x
    if kept.shape == old[name].shape:
      np.testing.assert_array_equal(kept, old[name], err_msg=name)


@pytest.mark.slow
def test_what_is_frozen_after_training_keeps_every_bit(went_on, here, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  new = tmp_path / "new"
  flags = ("--insert=1", "--config.optim.frozen=*/attention/*")
  result = here("surgery", f"--workdir={went_on[0]}", f"--out={new}", *flags)
  assert result.code == 0, result
  old, arrays = params_in(went_on[0])[1], params_in(new)[1]
  q = "params/layers/1/attention/q"
  assert arrays[q].dtype == F32 and np.any(old[q] != old[q].astype(BF16))
  np.testing.assert_array_equal(arrays[q], old[q])


@pytest.fixture
def convert(here, tmp_path):
  """Returns a function that makes `tmp_path / name` of a bfloat16 checkpoint of a family."""

  def run(model_type, name="run", *flags):
    there = tmp_path / "checkpoint"
    if not there.exists():
      write_checkpoint(model_type, there, "bfloat16")
    result = here("convert", f"--from_hf={there}", f"--workdir={tmp_path / name}", *flags)
    assert result.code == 0, result
    return tmp_path / name

  return run


@pytest.mark.slow
def test_a_run_whose_weights_are_of_two_dtypes_is_written_back_rounded(convert, here, tmp_path):
  run, back = convert("deepseek_v3"), tmp_path / "back"
  _, arrays = params_in(run)
  rng = np.random.default_rng(0)
  trained = {  # as a run leaves it whose attention was frozen
    name: x if "/attention/" in name or x.dtype == F32
    else (np.float32(x) * (1 + rng.normal(0, 1e-3, x.shape))).astype(np.float32)
    for name, x in arrays.items()
  }  # fmt: skip
  later = {name: LazyArray(x.shape, x.dtype, lambda x=x: x) for name, x in trained.items()}
  label = json.loads((run / "checkpoints/0/label/metadata").read_text())
  open_store(run).write_streamed(7, later, {**label["record"], "step": 7})
  assert params_in(run)[0] == 7
  result = here("convert", f"--workdir={run}", f"--to_hf={back}")
  assert result.code == 0, result
  again = tmp_path / "again"
  assert here("convert", f"--from_hf={back}", f"--workdir={again}").code == 0
  for name, x in params_in(again)[1].items():
    rounded = trained[name].astype(arrays[name].dtype)
    assert (x.dtype, x.tobytes()) == (rounded.dtype, rounded.tobytes()), name


SMALL = (
  "train.num_steps=60", "train.batch_size=4", "data.seq_len=32", "train.checkpoint_every=1000",
  "evaluation.every=0", "samples.every=0",
)  # fmt: skip


def trained(here, run, *changes):
  """Returns the losses of a run, its last parameters, and what its events say of masters."""
  flags = [f"--config.{change}" for change in (*SMALL, *changes)]
  result = here("train", f"--config={run}/config.json", f"--workdir={run}", *flags)
  assert result.code == 0, result
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  return np.array([line["loss"] for line in lines]), params_in(run)[1], result.out


@pytest.mark.slow
def test_a_converted_bfloat16_model_learns_as_one_of_a_float32_file_does(convert, here):
  flags = [f"--config.{change}" for change in SMALL]
  narrow = convert("olmoe", "narrow", *flags)
  wide = convert("olmoe", "wide", "--file_dtype=float32", *flags)
  (_, first), (losses, last, out) = params_in(narrow), trained(here, narrow)
  right, same, _ = trained(here, wide)
  assert np.abs(losses - right).max() < 2e-3
  np.testing.assert_array_equal(losses, right)  # both compute in bfloat16
  changed = np.concatenate([np.ravel(np.float32(first[name]) != x) for name, x in last.items()])
  assert changed.mean() > 0.95  # 114 of 10,720 when bfloat16 was the only copy
  for name, x in last.items():
    np.testing.assert_array_equal(x, same[name], err_msg=name)
  assert out.count("are bfloat16; they go on in float32") == 1
  assert not events_of(narrow, "standstill")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("change", "why"),
  [
    ("optim.master_dtype=bfloat16", "move by chance, right in the mean"),
    ("optim.learning_rate=1e-9", "optim.learning_rate=1e-09 is too small for float32"),
  ],
)
def test_a_run_of_which_most_stands_still_says_so_once(convert, here, change, why):
  run = convert("olmoe", "run", *[f"--config.{each}" for each in (*SMALL, change)])
  _, _, out = trained(here, run, change)
  assert out.count(why) == 1
  (event,) = events_of(run, "standstill")
  assert event["step"] == 30 and 0.5 < event["share"] < 1
  assert "unmoved" not in (run / "metrics.jsonl").read_text()
