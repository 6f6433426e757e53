"""Names, shapes and bits of every family's weights, there and back."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxmoe.core.errors import InputError
from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.models.pretrained.checkpoint import open_checkpoint
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.model_family import blocks, stack_of
from jaxmoe.models.pretrained.tensor_mapping import ParamMapping, TensorLayout, bind_params
from tests.models.pretrained.cases import GOLDEN
from tests.models.pretrained.golden import FOLDER


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_tensors_come_back_bit_for_bit_in_their_old_names(model_type, dtype, tmp_path):
  tensors = safetensors.numpy.load_file(FOLDER / model_type / "model.safetensors")
  tensors = {
    name: x if "correction_bias" in name else x.astype(jnp.dtype(dtype))
    for name, x in tensors.items()
  }
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_bytes((FOLDER / model_type / "config.json").read_bytes())
  checkpoint = open_checkpoint(FAMILIES, tmp_path)
  back = {name: np.zeros_like(x) for name, x in tensors.items()}
  written = dict.fromkeys(tensors, 0)
  for bound, layout in checkpoint.weights:
    if layout is None:
      continue
    for piece in bound.slices(bound.layout, checkpoint.gather(bound, layout)):
      back[piece.name].reshape(piece.apart)[piece.place] = piece.values
      written[piece.name] += piece.values.size
  assert written == {name: x.size for name, x in tensors.items()}
  for name, x in tensors.items():
    assert back[name].tobytes() == x.tobytes(), name


def bound_of(dims, shape, layout, **beside):
  (bound,) = bind_params([ParamMapping("x", dims, (layout,))], {"x": np.zeros(shape, np.float32)})
  return bound


@pytest.mark.parametrize(
  ("layout", "expected"),
  [
    (TensorLayout("t", "(n h) d"), lambda x: x.transpose(1, 2, 0).reshape(6, 4)),
    (TensorLayout("t", "d (h n)"), lambda x: x.transpose(0, 2, 1).reshape(4, 6)),
    (TensorLayout("t", "n h d"), lambda x: x.transpose(1, 2, 0)),
  ],
)
def test_a_layout_says_how_dims_lie(layout, expected):
  x_DNH = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
  bound = bound_of("d n h", x_DNH.shape, layout)
  (piece,) = bound.slices(layout, x_DNH)
  tensor = np.empty(bound.tensor_shape(layout), np.float32)
  tensor.reshape(piece.apart)[piece.place] = piece.values
  np.testing.assert_array_equal(tensor, expected(x_DNH))
  np.testing.assert_array_equal(bound.gather(layout, lambda name: tensor), x_DNH)


def test_two_leaves_share_a_tensor():
  mappings = [
    ParamMapping("k", "c n h", (TensorLayout("kv", "(n h+v) c"),)),
    ParamMapping("v", "c n v", (TensorLayout("kv", "(n h+v) c"),)),
  ]  # fmt: skip
  tensor = np.arange(2 * 5 * 3, dtype=np.float32).reshape(10, 3)
  shapes = {"k": np.zeros((3, 2, 4), np.float32), "v": np.zeros((3, 2, 1), np.float32)}
  k, v = (one.gather(one.layout, lambda name: tensor) for one in bind_params(mappings, shapes))
  np.testing.assert_array_equal(k, tensor.reshape(2, 5, 3)[:, :4].transpose(2, 0, 1))
  np.testing.assert_array_equal(v, tensor.reshape(2, 5, 3)[:, 4:].transpose(2, 0, 1))


def settings_of(model_type, **changes):
  plain = json.loads((FOLDER / model_type / "config.json").read_text())
  return ConfigReader({**plain, **changes}, "config.json")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_keys_of_transformers_4_are_read_like_those_of_5(model_type):
  new = settings_of(model_type)
  rope = dict(GOLDEN[model_type].get("rope_parameters", {}))
  theta = new.rope(0.0)[0]
  kind = rope.pop("rope_type", None)
  old = {"rope_parameters": None, "rope_theta": theta}
  if kind:
    rope.pop("rope_theta")
    old["rope_scaling"] = {"type": kind, **rope}
  elif model_type == "gpt_oss":
    old["rope_scaling"] = {"type": "default"}
  if model_type == "qwen3_moe":
    old |= {"num_local_experts": None, "num_experts": GOLDEN[model_type]["num_experts"]}
  read = FAMILIES[model_type].read
  assert read(settings_of(model_type, **old)) == read(new)


@pytest.mark.parametrize(
  ("model_type", "changes", "words"),
  [
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True is not known"),
    ("deepseek_v2", {"topk_method": "random"}, "topk_method='random' is not known"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not known"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not known"),
    ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts=0 must be at least 1"),
    ("gpt_oss", {"rope_parameters": None}, "has no rope_parameters or rope_scaling"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types=.*for each of 2 layers"),
    ("gpt_oss", {"layer_types": ["chunked", "chunked"]}, "must name sliding_attention or"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "wave": 1}}, "wave of a"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
  ],
)
def test_keys_that_are_not_understood_are_refused(model_type, changes, words):
  with pytest.raises(InputError, match=words):
    FAMILIES[model_type].read(settings_of(model_type, **changes))


def test_keys_that_nobody_reads_are_told():
  settings = settings_of("llama", new_trick=True)
  FAMILIES["llama"].read(settings)
  settings.get(str, "model_type")
  assert settings.unread == ["new_trick"]


@pytest.mark.parametrize(
  ("letters", "expected"),
  [
    ("aaaa", [("a", 4)]),
    ("abbb", [("a", 1), ("b", 3)]),
    ("abababa", [("ab", 3), ("a", 1)]),
    ("aabb", [("a", 2), ("b", 2)]),
    ("aaabaaab", [("aaab", 2)]),
    ("a", [("a", 1)]),
  ],
)
def test_layers_are_grouped_into_few_layer_groups(letters, expected):
  model = FAMILIES["mixtral"].read(settings_of("mixtral"))
  block = model.stack[0].pattern[0]
  of = {
    name: dataclasses.replace(block, attention=dataclasses.replace(block.attention, rope_theta=t))
    for name, t in (("a", 2.0), ("b", 3.0))
  }
  layers = [of[letter] for letter in letters]
  stack = stack_of(layers)
  assert [(group.pattern, group.repeats) for group in stack] == [
    (tuple(of[letter] for letter in pattern), repeats) for pattern, repeats in expected
  ]
  assert blocks(dataclasses.replace(model, stack=stack)) == layers
