"""Files of torch.save: their tensors, and what does not fit the file."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from jaxmoe.checkpoint.torch_file import STORAGES, Record, TorchFile, TorchTensor, tensors_of
from jaxmoe.core.errors import InputError
from tests.checkpoint.torch_zip import Stored, View, save, save_arrays

RNG = np.random.default_rng(0)


def found_in(path):
  return {name: tensor.read() for name, tensor in tensors_of(TorchFile(path).tree)}


def test_tensors_of_every_dtype_come_back_bit_for_bit(tmp_path):
  arrays = {
    dtype.name: RNG.integers(0, 2 if dtype.name == "bool" else 100, (3, 4)).astype(dtype)
    for dtype in STORAGES.values()
  }
  arrays |= {"none": np.zeros((0, 5), np.float32), "one": np.float32(7)}
  save_arrays(tmp_path / "a.bin", arrays)
  found = found_in(tmp_path / "a.bin")
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype and found[name].shape == array.shape
    assert found[name].tobytes() == np.asarray(array).tobytes(), name
    found[name][...] = 0  # a copy, that may be written


def test_views_share_a_storage(tmp_path):
  numbers = Stored(np.arange(24, dtype=np.float32), "0")
  save(tmp_path / "a.bin", {
    "turned": View(numbers, (6, 4), (1, 6)), "part": View(numbers, (2, 3), (6, 1), 7),
    "same": View(numbers, (24,), (1,)), "nested": {"list": [View(numbers, (1,), (1,), 5)]},
  })  # fmt: skip
  found, whole = found_in(tmp_path / "a.bin"), np.arange(24, dtype=np.float32)
  np.testing.assert_array_equal(found["turned"], whole.reshape(4, 6).T)
  np.testing.assert_array_equal(found["part"], whole.reshape(4, 6)[1:3, 1:4])
  assert found["nested.list.0"] == 5 and found["same"].shape == (24,)


def spoil_bytes(path):
  """Changes a byte of the numbers."""
  with zipfile.ZipFile(path) as archive:
    at = archive.getinfo("archive/data/0").header_offset
  data = bytearray(path.read_bytes())
  data[at + 30 + len("archive/data/0") + 2] ^= 1
  path.write_bytes(data)


def test_damaged_numbers_are_found_when_they_are_read(tmp_path):
  save_arrays(tmp_path / "a.bin", {"x": np.ones((2, 2), np.float32)})
  spoil_bytes(tmp_path / "a.bin")
  (pair,) = tensors_of(TorchFile(tmp_path / "a.bin").tree)
  with pytest.raises(InputError, match="storage 0 is damaged"):
    pair[1].read()


ONES = np.ones(6, np.float32)
WRONG = {
  "beyond": (View(Stored(ONES, "0"), (7,), (1,)), "beyond its storage of 6 numbers"),
  "offset": (View(Stored(ONES, "0"), (6,), (1,), 1), "beyond its storage"),
  "strides": (View(Stored(ONES, "0"), (2, 2), (5, 1)), "beyond its storage"),
  "expanded": (View(Stored(ONES, "0"), (1 << 40,), (0,)), "beyond its storage"),
  "negative": (View(Stored(ONES, "0"), (6,), (-1,), 5), "a tensor of no storage"),
  "ranks": (View(Stored(ONES, "0"), (2, 3), (1,)), "with strides"),
  "longer": (View(Stored(ONES, "0", size=7)), "24 bytes for 7 numbers"),
  "kind": (View(Stored(ONES, "0", kind="OddStorage")), "no storage of known numbers"),
  "tensor": (View("no storage", ()), "a tensor of no storage"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_the_file_is_one_line(tmp_path, name):
  view, words = WRONG[name]
  save(tmp_path / "a.bin", {"x": view})
  with pytest.raises(InputError, match=words) as caught:
    TorchFile(tmp_path / "a.bin")
  assert "\n" not in str(caught.value) and "a.bin" in str(caught.value)


def test_files_that_are_not_whole_are_one_line(tmp_path):
  tree, path = {"x": View(Stored(ONES, "0"))}, tmp_path / "a.bin"
  for options, words in (
    ({"order": b"big"}, "big-endian"), ({"without": ("data.pkl",)}, "no data.pkl"),
    ({"without": ("data/0",)}, "is not there"), ({"data": b"\x80\x02]"}, "exhausted"),
    ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
  ):  # fmt: skip
    save(path, tree, **options)
    with pytest.raises(InputError, match=words):
      TorchFile(path)
  for content in (b"", b"PK", pickle.dumps({"x": 1})):
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"no whole file of torch\.save"):
      TorchFile(path)
  save(path, tree)
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(InputError, match=r"no whole file of torch\.save"):
    TorchFile(path)


def test_nothing_of_a_file_is_run(tmp_path):
  class Runs:
    def __reduce__(self):
      return os.system, (f"touch {tmp_path}/ran",)

  save(tmp_path / "a.bin", {"x": Runs(), "y": View(Stored(ONES, "0"))})
  tree = TorchFile(tmp_path / "a.bin").tree
  assert isinstance(tree["x"], Record) and isinstance(tree["y"], TorchTensor)
  assert not (tmp_path / "ran").exists()


def test_a_tree_within_itself_has_an_end(tmp_path):
  endless = {"y": View(Stored(ONES, "0"))}
  endless["x"] = endless
  save(tmp_path / "a.bin", endless)
  with pytest.raises(InputError, match="nested deeper than 64"):
    list(tensors_of(TorchFile(tmp_path / "a.bin").tree))


