"""Universal folders that DeepSpeed 0.19.8 made of the shards beside them, and spoiled ones.

They are what its `ds_to_universal` wrote of `zero_1` and `zero_3`, so that each moment of shards is
held against what DeepSpeed itself makes of them.
"""

import pathlib
import shutil

import numpy as np
import pytest

from jaxmoe.checkpoint.deepspeed_universal import UniversalFolder
from jaxmoe.checkpoint.deepspeed_zero import MOMENTS, ZeroFolder
from jaxmoe.core.errors import InputError
from tests.checkpoint.torch_zip import Stored, View, save

HERE = pathlib.Path(__file__).parent
STAGES = (1, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_moments_of_shards_are_those_that_deepspeed_makes_of_them(stage):
  universal = UniversalFolder(HERE / f"universal_{stage}")
  shards = ZeroFolder(HERE / f"zero_{stage}")
  true = np.load(HERE / f"zero_{stage}" / "true.npz")
  assert universal.tensors.keys() == shards.tensors.keys() == set(true)
  assert (universal.count, universal.skipped) == (shards.count, shards.skipped) == (2, 0)
  assert [group["betas"] for group in universal.settings] == [(0.9, 0.999)] * 2
  for name in true:
    assert universal.read(name).tobytes() == true[name].tobytes(), name
    for moment in MOMENTS:
      found = universal.read(name, moment)
      assert found.shape == true[name].shape and found.any()
      assert found.tobytes() == shards.read(name, moment).tobytes(), (name, moment)


@pytest.fixture
def copy(tmp_path):
  """Returns a function that copies a folder with its files."""

  def make(stage):
    return pathlib.Path(shutil.copytree(HERE / f"universal_{stage}", tmp_path / "universal"))

  return make


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
  ("file", "words"),
  [("a.bias", "no zero/a.bias/fp32.pt"), ("b.weight/exp_avg.pt", "b.weight/exp_avg.pt: no whole"),
   ("optimizer_state.pt", "optimizer_state.pt: no whole")],
  ids=("parameter", "moment", "rest"),
)  # fmt: skip
def test_what_is_not_whole_is_one_line(copy, stage, file, words):
  folder = copy(stage)
  path = folder / "zero" / file
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  with pytest.raises(InputError, match=words) as caught:
    UniversalFolder(folder)
  assert "\n" not in str(caught.value)


def test_a_tensor_of_another_shape_or_step_is_one_line(copy):
  folder = copy(1)
  save(folder / "zero/a.bias/step.pt", View(Stored(np.float32([3]), "0"), ()))
  with pytest.raises(InputError, match=r"parts of different steps \[2\.0, 3\.0\]"):
    UniversalFolder(folder)
  turned = View(Stored(np.ones(35, np.float32), "0"), (5, 7), (1, 5))
  save(folder / "zero/b.weight/fp32.pt", {"param": turned})
  with pytest.raises(InputError, match=r"b\.weight/fp32\.pt of \(5, 7\)"):
    UniversalFolder(folder)
