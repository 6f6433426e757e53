"""What torch itself writes is read as torch reads it."""

import collections

import numpy as np
import pytest

from jaxmoe.checkpoint.torch_dcp import DcpFolder
from jaxmoe.checkpoint.torch_file import TorchFile, tensors_of

torch = pytest.importorskip("torch")


def plain(tensor):
  return tensor.detach().to(torch.float64).numpy()


def test_trees_of_torch_come_back(tmp_path):
  generator = torch.Generator().manual_seed(0)
  whole = torch.randn(6, 8, generator=generator)
  tree = {
    "model": collections.OrderedDict(
      whole=whole, turned=whole.T, part=whole[2:4, ::2], half=whole.half(), brain=whole.bfloat16(),
      wide=whole.double(), ids=torch.arange(7), flags=torch.tensor([True, False]),
      one=torch.tensor(3.5), none=torch.zeros(0, 4), parameter=torch.nn.Parameter(whole[0]),
    ),
    "optimizer": torch.optim.AdamW([torch.nn.Parameter(whole)]).state_dict(),
    "linear": torch.nn.Linear(3, 5).state_dict(), "shape": whole.shape, "epoch": 3,
  }  # fmt: skip
  torch.save(tree, tmp_path / "a.pt")
  found = TorchFile(tmp_path / "a.pt").tree
  assert found["epoch"] == 3 and found["shape"] == (6, 8)
  assert found["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
  tensors = dict(tensors_of(found))
  for part in ("model", "linear"):
    for name, true in tree[part].items():
      mine = tensors[f"{part}.{name}"]
      assert mine.shape == tuple(true.shape)
      assert str(true.dtype).removeprefix("torch.") == mine.dtype.name
      np.testing.assert_array_equal(mine.read().astype(np.float64), plain(true))


def test_a_whole_module_is_a_record_and_its_code_is_not_run(tmp_path):
  torch.save(torch.nn.Linear(3, 5), tmp_path / "a.pt")
  found = TorchFile(tmp_path / "a.pt").tree
  assert str(found.of) == "torch.nn.modules.linear.Linear"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_that_torch_writes_is_read(tmp_path):
  saved = pytest.importorskip("torch.distributed.checkpoint")
  tree = {"model": torch.nn.Linear(3, 5).state_dict(), "epoch": 2, "ids": torch.arange(4)}
  saved.save(tree, checkpoint_id=tmp_path / "a", no_dist=True)
  folder = DcpFolder(tmp_path / "a")
  assert set(folder.tensors) == {"model.weight", "model.bias", "ids"}
  for name in ("weight", "bias"):
    np.testing.assert_array_equal(folder.read(f"model.{name}"), tree["model"][name].numpy())
