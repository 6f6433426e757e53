"""Files of tensors as they come to lie on a disk."""

import os
import stat

import numpy as np
import pytest

from jaxmoe.models.pretrained.safetensors_writer import TensorSpec, plan_shards, write_shards
from jaxmoe.models.pretrained.tensor_mapping import TensorSlice


@pytest.fixture
def masked():
  """Returns a function that sets the umask, which is what it was after the test."""
  before = os.umask(0)
  yield os.umask
  os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("limit_bytes", [16, 10**9])
def test_files_may_be_read_by_whom_the_umask_lets(tmp_path, masked, umask, limit_bytes):
  masked(umask)
  tensors = [TensorSpec(name, (4,), np.dtype(np.float32)) for name in "ab"]
  pieces = [TensorSlice(name, (4,), (slice(0, 4),), np.arange(4.0)) for name in "ab"]
  write_shards(tmp_path, plan_shards(tensors, limit_bytes), iter(pieces), lambda size: None)
  modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
  assert set(modes.values()) == {0o666 & ~umask}
  assert len(modes) == (3 if limit_bytes == 16 else 1)
