"""Folders whose weights torch.save wrote become the runs that their safetensors become."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from tests.checkpoint.dcp_folder import Entry, save_folder
from tests.checkpoint.torch_zip import Stored, View, save, save_arrays
from tests.models.pretrained.checkpoint import bits, tensors_of

ROOT = pathlib.Path(__file__).parents[2]


def as_torch(folder, shards):
  """Puts the weights of a folder into files of torch.save."""
  tensors = tensors_of(folder)
  for path in folder.glob("model*.safetensors*"):
    path.unlink()
  names = sorted(tensors)
  if shards == 1:
    save_arrays(folder / "pytorch_model.bin", tensors)
    return
  weight_map = {}
  for at in range(shards):
    file = f"pytorch_model-{at + 1:05}-of-{shards:05}.bin"
    save_arrays(folder / file, {name: tensors[name] for name in names[at::shards]})
    weight_map |= dict.fromkeys(names[at::shards], file)
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", (1, 3))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_the_same_weights_come_out(convert, checkpoint, tmp_path, dtype, shards):
  there = checkpoint("mixtral", dtype)
  tensors = bits(tensors_of(there))
  as_torch(there, shards)
  convert(f"--from_hf={there}", f"--workdir={tmp_path / 'run'}")
  convert(f"--workdir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'back'}")
  assert bits(tensors_of(tmp_path / "back")) == tensors


def test_a_folder_of_a_training_run_of_torch_is_read(convert, checkpoint, tmp_path):
  there = checkpoint("mixtral", "float32")
  tensors = tensors_of(there)
  (there / "model.safetensors").unlink()
  entries = {}
  for name, array in tensors.items():
    half, rest = array.shape[0] // 2, array.shape[1:]
    nothing = (0,) * len(rest)
    parts = {(0, *nothing): (half, *rest), (half, *nothing): (array.shape[0] - half, *rest)}
    for called in (f"model.{name}", f"optimizer.state.{name}.exp_avg"):
      entries[called] = Entry(array, parts)
  save_folder(there, entries)
  convert(f"--from_hf={there}", f"--workdir={tmp_path / 'run'}")
  convert(f"--workdir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'back'}")
  assert bits(tensors_of(tmp_path / "back")) == bits(tensors)


def test_safetensors_are_read_where_both_are(convert, checkpoint, tmp_path):
  there = checkpoint("llama")
  (there / "pytorch_model.bin").write_bytes(b"no file of torch")
  convert(f"--from_hf={there}", f"--workdir={tmp_path / 'run'}")


def test_what_is_no_state_dict_is_one_line(here, checkpoint, tmp_path):
  there = checkpoint("llama")
  (there / "model.safetensors").unlink()
  weights = {"norm": View(Stored(np.ones(3, np.float32), "0"))}
  save(there / "pytorch_model.bin", {"model": weights, "step": 3})
  result = here("convert", f"--from_hf={there}", f"--workdir={tmp_path / 'run'}")
  assert result.code == 2 and not (tmp_path / "run").exists()
  (line,) = result.err.strip().splitlines()
  assert "something else than tensors by name; save a state_dict" in line


def test_shards_of_zero_are_found_by_their_names(here, tmp_path):
  there = tmp_path / "checkpoint"
  shutil.copytree(ROOT / "tests" / "checkpoint" / "zero_3", there)
  shutil.copy(ROOT / "tests/models/pretrained/golden/mixtral/config.json", there)
  result = here("convert", f"--from_hf={there}", f"--workdir={tmp_path / 'run'}")
  assert result.code == 2 and "no tensor, or several, end in model.embed_tokens" in result.err
