"""Runs of public checkpoints: in any store, of files of before, by themselves after surgery."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

import jaxmoe
from jaxmoe.checkpoint import open_store
from jaxmoe.checkpoint.npz_store import NpzStore
from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.models.pretrained.checkpoint import open_checkpoint
from jaxmoe.train.workdir import Workdir
from tests.models.pretrained.checkpoint import bits, tensors_of

ROOT = pathlib.Path(__file__).parents[2]
BEFORE = ROOT / "tests" / "launch" / "before" / "converted" / "config.json"
SMALL = (
  "data.held_out=0.3", "data.seq_len=32", "train.num_steps=2", "train.batch_size=2",
  "optim.schedule.warmup_steps=1", "evaluation.every=0", "samples.every=0",
)  # fmt: skip


def test_a_checkpoint_is_written_to_the_store_that_the_recipe_names(convert, checkpoint, tmp_path):
  there, run, back = checkpoint("deepseek_v3", "mixed"), tmp_path / "run", tmp_path / "back"
  convert(f"--from_hf={there}", f"--workdir={run}", "--config.train.store=npz")
  assert isinstance(open_store(run), NpzStore)
  assert {path.name for path in (run / "checkpoints" / "0").iterdir()} == {
    "arrays.npz", "manifest.json"
  }  # fmt: skip
  convert(f"--workdir={run}", f"--to_hf={back}")
  assert bits(tensors_of(back)) == bits(tensors_of(there))


def test_a_run_whose_config_has_the_names_of_before_is_written_back(
  convert, checkpoint, here, tmp_path, monkeypatch
):
  """The config is what convert of 2026-11-30 wrote of the same checkpoint."""
  plain = BEFORE.read_text()
  names = ("hidden", "shared_hidden", "closed", "parity", "max_copy_gib")
  assert all(f'"{name}":' in plain for name in names) and "mlp_dim" not in plain
  there, run, back = checkpoint("deepseek_v3"), tmp_path / "run", tmp_path / "back"
  convert(f"--from_hf={there}", f"--workdir={run}", f"--text={ROOT}/tests/launch/before/text/plain")
  today = json.loads((run / "config.json").read_text())
  carried = json.loads(plain)["data"]["tokenizer"]["path"]
  (run / "config.json").write_text(plain.replace(carried, today["data"]["tokenizer"]["path"]))
  result = convert(f"--workdir={run}", f"--to_hf={back}")
  assert "rounded" not in result.out and bits(tensors_of(back)) == bits(tensors_of(there))
  again = tmp_path / "again"
  convert(f"--from_hf={back}", f"--workdir={again}")
  assert digests(again) == digests(run)
  monkeypatch.chdir(ROOT)  # the text lies where the config says
  written = here("generate", f"--workdir={run}", "--prompt=def f", "--max_tokens=4")
  assert (written.code, written.err) == (0, "")
  scored = here("evaluate", f"--workdir={run}")
  assert scored.code == 0, scored
  assert json.loads((run / "eval.json").read_text())["domains"].keys() == {"text"}


def digests(run):
  """Returns what the manifest of a converted run says of each array."""
  label = json.loads((run / "checkpoints" / "0" / "label" / "metadata").read_text())
  return label["arrays"]


def test_a_run_of_before_is_opened_and_one_that_no_family_has_is_refused(here, tmp_path,
                                                                         monkeypatch):  # fmt: skip
  monkeypatch.chdir(ROOT)
  run = tmp_path / "run"
  shutil.copytree(BEFORE.parents[1] / "chats", run)
  before = json.loads((run / "checkpoints" / "4" / "label" / "metadata").read_text())["arrays"]
  found = jaxmoe.open(run)
  assert found.step == 4
  assert found.decoder.num_params == sum(
    int(np.prod(entry["shape"])) for name, entry in before.items() if name.startswith("params/")
  )
  written = here("generate", f"--workdir={run}", "--prompt=def f", "--max_tokens=4")
  assert (written.code, written.err) == (0, "")
  scored = here("evaluate", f"--workdir={run}")
  assert scored.code == 0, scored
  refused = here("convert", f"--workdir={run}", f"--to_hf={tmp_path / 'back'}")
  assert (refused.code, len(refused.err.splitlines())) == (2, 1)
  assert "no public family has" in refused.err and not (tmp_path / "back").exists()


def test_a_run_after_surgery_needs_neither_the_old_one_nor_the_checkpoint(
  convert, checkpoint, here, text, tmp_path
):
  there, old, new = checkpoint("llama"), tmp_path / "old", tmp_path / "new"
  flags = [f"--config.{change}" for change in SMALL]
  convert(f"--from_hf={there}", f"--workdir={old}", f"--text={text}", *flags)
  result = here("surgery", f"--workdir={old}", f"--out={new}", "--upcycle=2")
  assert result.code == 0, result
  for folder in (old, there):
    shutil.rmtree(folder)
  path = Workdir(new).experiment().data.tokenizer.path
  assert path == str(new / "pretrained" / "tokenizer.json")
  written = here("generate", f"--workdir={new}", "--prompt=def f", "--max_tokens=4")
  assert (written.code, written.err) == (0, "")
  result = here("train", f"--config={new}/config.json", f"--workdir={new}")
  assert result.code == 0 and "done: step 2" in result.out, result
  third = tmp_path / "third"
  result = here("surgery", f"--workdir={new}", f"--out={third}", "--clone=2")
  assert result.code == 0, result
  assert Workdir(third).experiment().data.tokenizer.path.startswith(str(third))


@pytest.mark.parametrize(("num", "words"), [(2, "2 tensors are"), (1, "1 tensor is")])
def test_tensors_that_are_left_aside_are_told_with_their_number(
  convert, checkpoint, tmp_path, num, words
):
  folder, run = checkpoint("deepseek_v3"), tmp_path / "run"
  names = ["model.layers.61.enorm.weight", "model.layers.61.hnorm.weight"][:num]
  frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
  tensors = dict.fromkeys([*names, frequencies], np.ones(3, np.float32))
  path = folder / "model.safetensors"
  safetensors.numpy.save_file({**tensors_of(folder), **tensors}, path, metadata={"format": "pt"})
  more = " and 1 more" if num == 2 else ""
  line = f"note: {words} left aside, as transformers does: {names[0]}{more}"
  assert line in convert(f"--from_hf={folder}", f"--workdir={run}").out.splitlines()
  event = json.loads((run / "events.jsonl").read_text())
  assert (event["event"], event["left_aside"]) == ("convert", num)
  with pytest.warns(UserWarning, match=words):
    jaxmoe.from_pretrained(folder)
  assert open_checkpoint(FAMILIES, folder).left_aside == names


def test_nothing_is_said_where_every_tensor_is_read(convert, checkpoint, tmp_path):
  result = convert(f"--from_hf={checkpoint('deepseek_v3')}", f"--workdir={tmp_path / 'run'}")
  assert "left aside" not in result.out
  assert "left_aside" not in (tmp_path / "run" / "events.jsonl").read_text()
