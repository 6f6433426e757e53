import dataclasses
import re

import jax
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.train.routing_record import (
  choices_of,
  digests_of,
  experts_by_depth,
  read_routing,
  write_routing,
)

VOCAB = 19
IDS = np.random.default_rng(0).integers(0, VOCAB, (2, 6)).astype(np.int32)


def moe_block(num_experts, num_active, **fields):
  moe = MoEConfig(num_experts, num_active, experts=SwiGLU(mlp_dim=4), **fields)
  return BlockConfig(SoftmaxAttention(num_heads=1, num_kv_heads=1, head_dim=4), moe)


@pytest.fixture(scope="module")
def mixed(decoder_of):
  """A decoder of a dense layer, two layers top-1 of 3 and one top-2 of 5 with one closed."""
  dense = BlockConfig(
    SoftmaxAttention(num_heads=1, num_kv_heads=1, head_dim=4), MLPConfig(mlp_dim=4)
  )
  return decoder_of(stack=lambda block: (
    LayerGroup((dense,), repeats=1),
    LayerGroup((moe_block(3, 1, router=ROUTERS["sigmoid"][1]),), repeats=2),
    LayerGroup((moe_block(5, 2, num_inactive=1),), repeats=1),
  ))  # fmt: skip


@pytest.fixture
def saved(mixed, params_of, tmp_path):
  """Returns a function (changes) -> the path of a file whose arrays are changed by them."""
  tokens = dataclasses.replace(Tokens.of_ids(jax.numpy.asarray(IDS)), return_routing=True)
  choices = np.asarray(choices_of(mixed, params_of(mixed), tokens))

  def save(**changes):
    path = tmp_path / "routing.npz"
    write_routing(path, choices, digests_of(mixed.config, VOCAB, IDS))
    if changes:
      with np.load(path) as arrays:
        content = dict(arrays)
      change = {name: value(content[name]) if callable(value) else value
                for name, value in changes.items()}  # fmt: skip
      np.savez(path, **{k: v for k, v in (content | change).items() if v is not None})
    return path, choices

  return save


def test_choices_stand_by_depth_and_dense_layers_and_missing_choices_have_none(saved, mixed):
  path, choices = saved()
  assert experts_by_depth(mixed.config) == [0, 3, 3, 4]
  assert choices.shape == (4, 2, 6, 2) and choices.dtype == np.int16
  assert (choices[0] == -1).all() and (choices[1:3, ..., 1] == -1).all()
  assert (choices[1:3, ..., 0] >= 0).all() and (choices[3] >= 0).all()
  assert choices[1:3].max() == 2 and choices[3].max() == 3
  read = read_routing(str(path), "--x", mixed.config, VOCAB, IDS)
  np.testing.assert_array_equal(read, choices)


REFUSED = {
  "other token ids": {"ids": "0" * 64},
  "another model": {"model": "0" * 64},
  "no routing of this version": {"version": 2},
  "holds no routing": {"ids": None},
  "must be int16 (4, 2, 6, '1 to 4'), not int32": {"choices": lambda c: c.astype(np.int32)},
  "not int16 (3, 2, 6, 2)": {"choices": lambda c: c[:3]},
  "not int16 (4, 2, 6, 6)": {"choices": lambda c: np.tile(c, 3)},
  "layer 0 has 0 experts, not one called 0": {"choices": lambda c: c * 0},
  "layer 1 has 3 experts, not one called -2": {
    "choices": lambda c: np.where(np.arange(4)[:, None, None, None] == 1, np.int16(-2), c)
  },
  "layer 3 sends a token to one expert twice": {"choices": lambda c: np.minimum(c, np.int16(0))},
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_a_file_that_does_not_fit_is_refused_in_one_line(saved, mixed, words):
  path, _ = saved(**REFUSED[words])
  with pytest.raises(InputError, match=re.escape(words)) as refused:
    read_routing(str(path), "--x", mixed.config, VOCAB, IDS)
  assert "\n" not in str(refused.value) and str(refused.value).startswith("--x: ")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04junk", b"\x80\x04N.", None])
def test_a_damaged_file_is_refused_in_one_line(saved, mixed, content):
  path, _ = saved()
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2] if content is None else content)
  with pytest.raises(InputError, match=r"is damaged or no \.npz") as refused:
    read_routing(str(path), "--x", mixed.config, VOCAB, IDS)
  assert "\n" not in str(refused.value)


def test_a_flipped_bit_of_the_choices_is_refused(saved, mixed):
  path, _ = saved()
  content = bytearray(path.read_bytes())
  content[content.index(b"choices.npy") + 60] ^= 4
  path.write_bytes(content)
  with pytest.raises(InputError, match=r"is damaged or no \.npz"):
    read_routing(str(path), "--x", mixed.config, VOCAB, IDS)


def test_ids_of_another_order_or_shape_and_another_vocabulary_are_others(mixed):
  first = digests_of(mixed.config, VOCAB, IDS)
  assert first == digests_of(mixed.config, VOCAB, np.asfortranarray(IDS))
  for ids in (IDS[::-1], IDS.reshape(3, 4)):
    assert digests_of(mixed.config, VOCAB, ids)["ids"] != first["ids"]
  other = dataclasses.replace(mixed.config, norm_eps=1e-3)
  for model, vocab_size in ((other, VOCAB), (mixed.config, 20)):
    assert digests_of(model, vocab_size, IDS)["model"] != first["model"]
