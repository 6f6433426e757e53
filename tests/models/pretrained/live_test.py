"""Every family against transformers itself, in more shapes than have golden files."""

import numpy as np
import pytest

from tests.models.pretrained import reference
from tests.models.pretrained.cases import GOLDEN, LATENT, LIVE, LLAMA3, LONG, YARN
from tests.models.pretrained.ours import Ours, check_forward, check_gradients, check_greedy

pytest.importorskip("transformers")

FAR = {
  "llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
  "yarn": ("qwen3", {"rope_parameters": {**YARN, "original_max_position_embeddings": 1024}}),
  "yarn, not cut": (
    "gpt_oss", {**GOLDEN["gpt_oss"], "rope_parameters": {
      **YARN, "original_max_position_embeddings": 1024, "truncate": False}},
  ),
  "linear": ("llama", {"rope_parameters": {**YARN, "rope_type": "linear"}}),
  "yarn of latents": (
    "deepseek_v3", {**LATENT, "q_lora_rank": 8, "rope_parameters": {
      **YARN, "original_max_position_embeddings": 1024, "mscale": 0.7, "mscale_all_dim": 1.0}},
  ),
}  # fmt: skip


def saved(model_type, changes, folder, **options):
  model = reference.build(model_type, changes, seed=1)
  reference.save(model, folder, **options)
  return model, Ours(folder)


@pytest.mark.parametrize("case", LIVE)
def test_a_family_computes_what_transformers_does(case, tmp_path):
  ids = reference.ids_of((2, 20), seed=3)
  model, *written = reference.sure(*LIVE[case], ids[:, :6], 10)
  reference.save(model, tmp_path)
  ours = Ours(tmp_path)
  grads = check_forward(ours, ids, *reference.forward(model, ids))
  check_gradients(ours, grads, reference.gradients(model, ids))
  check_greedy(ours, ids[:, :6], *written)


@pytest.mark.parametrize("case", FAR)
def test_positions_past_4096_turn_as_far_as_in_transformers(case, tmp_path):
  model, ours = saved(*FAR[case], tmp_path)
  ids = reference.ids_of((1, 20), seed=4)
  position = np.arange(20, dtype=np.int32)[None] * 331
  check_forward(ours, ids, *reference.forward(model, ids, position), position)


def test_phimoe_past_its_original_length_has_long_factors_which_transformers_leaves_out(tmp_path):
  """There it has the long gain with the short factors; given the long ones as short, we agree."""
  position = np.arange(20, dtype=np.int32)[None] * 331
  far = {**LONG, "original_max_position_embeddings": 16}
  model, ours = saved("phimoe", {**GOLDEN["phimoe"], "rope_parameters": far}, tmp_path)
  model.config.rope_parameters["short_factor"] = LONG["long_factor"]
  ids = reference.ids_of((1, 20), seed=4)
  check_forward(ours, ids, *reference.forward(model, ids, position), position)
  model.config.rope_parameters["short_factor"] = LONG["short_factor"]
  with pytest.raises(AssertionError):
    check_forward(ours, ids, *reference.forward(model, ids, position), position)


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe", "granitemoe", "qwen3_moe"])
def test_fused_experts_and_shards_are_read_alike(model_type, tmp_path):
  changes = GOLDEN[model_type]
  model, ours = saved(model_type, changes, tmp_path / "old")
  reference.save(
    model, tmp_path / "fused", save_original_format=False, max_shard_size="8KB"
  )
  assert len(list((tmp_path / "fused").glob("*.safetensors"))) > 1
  fused = Ours(tmp_path / "fused")
  names = set(fused.checkpoint.files.shapes)
  assert any(name.endswith("gate_up_proj") for name in names)
  for (one, layout), (other, of) in zip(ours.checkpoint.weights, fused.checkpoint.weights):
    assert one.name == other.name
    np.testing.assert_array_equal(
      ours.checkpoint.gather(one, layout), fused.checkpoint.gather(other, of)
    )
