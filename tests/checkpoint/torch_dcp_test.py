"""Folders of torch.distributed.checkpoint: one that torch wrote, and wrong ones."""

import pathlib
import pickle

import numpy as np
import pytest

from jaxmoe.checkpoint.torch_dcp import DcpFolder
from jaxmoe.core.errors import InputError
from tests.checkpoint.dcp_folder import COMPLEX, Entry, save_folder

GOLDEN = pathlib.Path(__file__).parent / "dcp_of_two"  # torch 2.13, two processes
WHOLE = np.arange(12, dtype=np.float32).reshape(3, 4)
CHUNKS = {(0, 0): (2, 4), (2, 0): (1, 4)}


def write(folder, file="__0_0.distcp", info=None, **said):
  save_folder(folder, {"x": Entry(WHOLE, CHUNKS, **said)}, file, info or {})
  return folder


def test_what_two_processes_of_torch_wrote_is_put_together():
  folder, true = DcpFolder(GOLDEN), np.load(GOLDEN / "true.npz")
  tensors = {name: tensor for name, tensor in folder.tensors.items() if name != "plain"}
  assert tensors.keys() == {f"model.{name}" for name in true}
  assert {len(tensor.chunks) for tensor in tensors.values()} == {1, 2}
  for name, tensor in tensors.items():
    found, right = folder.read(name), true[name.removeprefix("model.")]
    assert found.shape == tensor.shape == right.shape and found.dtype == tensor.dtype
    assert found.tobytes() == right.tobytes(), name
  np.testing.assert_array_equal(folder.read("plain"), np.arange(5))


def test_chunks_are_put_together(tmp_path):
  folder = DcpFolder(write(tmp_path))
  assert list(folder.tensors) == ["x"]
  np.testing.assert_array_equal(folder.read("x"), WHOLE)


@pytest.mark.parametrize("options, words", (
  ({"said": {(0, 0): (2, 4)}}, "not all of it"),
  ({"said": {(0, 0): (3, 4), (2, 0): (1, 4)}}, "overlap"),
  ({"said": {(0, 0): (2, 4), (2, 0): (2, 4)}}, "beyond its shape"),
  ({"said": {(0, 0): (2, 4), (1, 0): (1, 4)}}, "not what torch writes there"),
  ({"file": "../secret"}, "no file beside it"),
  ({"info": {"transform_descriptors": ["zstd"]}}, "compressed"),
  ({"dtype": COMPLEX}, "unknown dtype"),
  ({"shape": (-3, 4)}, "dims"),
), ids=str)  # fmt: skip
def test_what_cannot_be_is_one_line(tmp_path, options, words):
  with pytest.raises(InputError, match=words) as caught:
    DcpFolder(write(tmp_path, **options))
  assert "\n" not in str(caught.value) and ".metadata" in str(caught.value)


def test_files_that_do_not_fit_are_one_line(tmp_path):
  folder = DcpFolder(write(tmp_path, stored={(0, 0): (1, 4), (2, 0): (1, 4)}))
  with pytest.raises(InputError, match="holds another part of x"):
    folder.read("x")
  folder, path = DcpFolder(write(tmp_path)), tmp_path / "__0_0.distcp"
  path.write_bytes(path.read_bytes()[:-50])
  with pytest.raises(InputError, match="ends before the part"):
    folder.read("x")
  path.unlink()
  with pytest.raises(InputError, match=r"no whole file of torch\.save"):
    folder.read("x")
  (tmp_path / ".metadata").write_bytes(pickle.dumps({"x": 1}))
  with pytest.raises(InputError, match="no Metadata"):
    DcpFolder(tmp_path)
