"""Which dtype a tensor is written in, and what casting to it changes."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.models.pretrained import casting as module
from jaxmoe.models.pretrained.casting import Caster
from jaxmoe.models.pretrained.checkpoint import open_checkpoint
from jaxmoe.models.pretrained.dtypes import Dtypes, dtypes_of, read_dtypes
from jaxmoe.models.pretrained.shared_mappings import mapping
from jaxmoe.models.pretrained.tensor_mapping import BoundParam, TensorSlice
from tests.models.pretrained.checkpoint import tensors_of, write_checkpoint

KEPT = Dtypes({
  "layers/0/moe/experts/down": {"down.0": "bfloat16", "down.1": "float16"},
  "layers/0/attention/q": "float16", "layers/0/attention/k": "float16", "embed/table": "bfloat16",
})  # fmt: skip


def bound(name):
  return BoundParam(name, (2, 3), np.dtype(np.float32), mapping("x", "e d", ("down.{e}", "d")), 0)


@pytest.mark.parametrize(
  ("name", "tensor", "dtype"),
  [
    ("layers/0/attention/q", "q", "float16"),
    ("layers/0/moe/experts/down", "down.0", "bfloat16"),
    ("layers/0/moe/experts/down", "down.2", "float32"),  # a new expert, between both
    ("layers/0/moe/experts/gate_up", "gate.0", "float16"),  # new: what most have
    ("layers/0/moe/router/buffers/bias", "bias", "float32"),  # new, and no parameter
  ],
)
def test_what_an_origin_did_not_have_takes_after_its_likes(name, tensor, dtype):
  assert KEPT.of(bound(name), tensor) == jnp.dtype(dtype)


def test_dtypes_are_those_of_the_tensors_and_come_back_from_a_file(tmp_path):
  write_checkpoint("deepseek_v3", tmp_path / "mixed", "mixed")
  checkpoint = open_checkpoint(FAMILIES, tmp_path / "mixed")
  dtypes_of(checkpoint).write(tmp_path / "dtypes.json")
  found = read_dtypes(tmp_path / "dtypes.json")
  tensors = tensors_of(tmp_path / "mixed")
  assert {x.dtype.name for x in tensors.values()} == {"float32", "bfloat16", "float16"}
  told = {
    name: found.of(bound, name)
    for bound, layout in checkpoint.weights
    for name, _ in bound.tensors(layout)
  }
  assert told == {name: x.dtype for name, x in tensors.items()}


@pytest.mark.parametrize("text", ["{", "[]", '{"weights": {}}', '{"weights": {"a": "int8"}}'])
def test_a_damaged_file_of_dtypes_is_named(tmp_path, text):
  path = tmp_path / "dtypes.json"
  assert read_dtypes(path) is None
  path.write_text(text)
  with pytest.raises(InputError, match=r"dtypes.json: cannot be read .* restore the file"):
    read_dtypes(path)


def test_casting_in_parts_counts_what_changes(monkeypatch):
  monkeypatch.setattr(module, "_AT_A_TIME", 6)
  values = np.array([[1.0, 1.5, 3.0001], [np.nan, np.inf, 0.1]] * 4, np.float32)
  piece = TensorSlice("x", (9, 3), (slice(1, 9), slice(0, 3)), values)
  rounding, whole = Caster(), np.zeros((9, 3), jnp.bfloat16)
  parts = list(rounding.cast(piece, whole.dtype))
  for part in parts:
    whole[part.place] = part.values
  assert len(parts) == 4
  right = values.astype(jnp.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(whole[1:].astype(np.float32), right)
  assert rounding.changed == {"bfloat16": 8}
  assert list(rounding.cast(piece, values.dtype)) == [piece]


def test_a_number_that_becomes_infinite_is_refused():
  piece = TensorSlice("some.weight", (2,), (slice(0, 2),), np.array([1.0, 7e4], np.float32))
  with pytest.raises(InputError, match=r"some\.weight has numbers that float16 cannot hold"):
    list(Caster().cast(piece, np.dtype(np.float16)))
