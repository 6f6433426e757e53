"""Shards of ZeRO that DeepSpeed wrote, and shards that do not fit each other."""

import pathlib
import shutil

import numpy as np
import pytest

from jaxmoe.checkpoint.deepspeed_zero import ZeroFolder, ZeroTensor
from jaxmoe.core.errors import InputError
from jaxmoe.models.pretrained.checkpoint_files import CheckpointFiles

# DeepSpeed 0.19.8, two processes, two groups of parameters in bfloat16, two steps; `true.npz` is
# what its own zero_to_fp32 makes of them.
GOLDEN = {stage: pathlib.Path(__file__).parent / f"zero_{stage}" for stage in (1, 3)}
STEP = "global_step2"


@pytest.mark.parametrize("inside", (False, True))
@pytest.mark.parametrize("stage", GOLDEN)
def test_weights_are_those_that_deepspeed_makes_of_them(stage, inside):
  true = np.load(GOLDEN[stage] / "true.npz")
  folder = ZeroFolder(GOLDEN[stage] / STEP if inside else GOLDEN[stage])
  assert set(folder.tensors) == set(true)
  for name in true:
    found = folder.read(name)
    assert found.dtype == np.float32 and found.tobytes() == true[name].tobytes(), name
  assert any(len(tensor.pieces) == 2 for tensor in folder.tensors.values())


@pytest.fixture
def copy(tmp_path):
  """Returns a function that copies a folder with its files."""

  def make(stage):
    return pathlib.Path(shutil.copytree(GOLDEN[stage] / STEP, tmp_path / "step"))

  return make


@pytest.mark.parametrize("stage", GOLDEN)
def test_what_is_not_whole_is_one_line(copy, stage):
  folder = copy(stage)
  (part,) = folder.glob("*rank_1*optim*")
  part.rename(folder / part.name.replace("rank_1", "rank_2"))
  with pytest.raises(InputError, match=r"parts \[0, 2\]"):
    ZeroFolder(folder)
  (folder / part.name.replace("rank_1", "rank_2")).unlink()  # all that is left is half of it
  with pytest.raises(InputError, match="parts that end before their parameters"):
    ZeroFolder(folder)
  for path in folder.glob("*model_states.pt"):
    path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(InputError, match=r"no whole file of torch\.save"):
    ZeroFolder(folder)


def test_what_is_not_handled_is_named(copy):
  folder = copy(1)
  (folder / "layer_0_expert_1_mp_rank_00_model_states.pt").write_bytes(b"")
  with pytest.raises(InputError, match="experts that lie apart"):
    ZeroFolder(folder)
  (folder / "layer_0_expert_1_mp_rank_00_model_states.pt").unlink()
  (folder / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(b"")
  with pytest.raises(InputError, match="tensor-parallel"):
    ZeroFolder(folder)


def test_a_folder_names_its_files_by_latest_and_nothing_outside(tmp_path):
  (tmp_path / "latest").write_text("../secret")
  with pytest.raises(InputError, match=r"parts \[\]"):
    ZeroFolder(tmp_path)


def test_a_model_without_a_table_is_refused_by_name(copy):
  with pytest.raises(InputError, match=r"where the model lies is not known; there are a\.bias"):
    CheckpointFiles(copy(1))


def test_damaged_numbers_are_found(copy):
  folder = copy(3)
  (path,) = folder.glob("*pp_rank_0_*optim*")
  tensor: ZeroTensor = ZeroFolder(folder).tensors["a.weight"]
  data = path.read_bytes()
  numbers = tensor.pieces[0].flat.part(0, 4).tobytes()
  at = data.index(numbers)
  path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
  with pytest.raises(InputError, match="is damaged"):
    ZeroFolder(folder).read("a.weight")
