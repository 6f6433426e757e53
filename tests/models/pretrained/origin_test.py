"""config.json of models that came from a checkpoint: what need not change stays."""

import dataclasses
import json

import pytest

from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.model_family import essence
from jaxmoe.models.pretrained.origin import with_origin
from jaxmoe.moe.balance import LoadBalance
from jaxmoe.moe.layer import MoEConfig
from tests.models.pretrained.golden import FOLDER

INERT = {
  "_name_or_path": "someone/something", "architectures": ["Renamed"], "attention_dropout": 0.1,
  "bos_token_id": 7, "eos_token_id": [3, 5], "pad_token_id": 9, "initializer_range": 0.013,
  "max_position_embeddings": 77, "use_cache": False, "transformers_version": "4.40.1",
  "torch_dtype": "float16", "output_router_logits": True, "pretraining_tp": 2,
  "router_aux_loss_coef": 0.123, "aux_loss_alpha": 0.0321, "seq_aux": True, "ep_size": 4,
  "max_window_layers": 28, "task_specific_params": {"a": [1]},
  "unsloth_version": "2024.9", "hidden_act": "swish",
}  # fmt: skip
"""Values that change no logit of any golden model, some of keys that nobody reads."""


def golden(kind, **changes):
  return {**json.loads((FOLDER / kind / "config.json").read_text()), **changes}


def read(kind, plain):
  return FAMILIES[kind].read(ConfigReader(plain, "config.json"))


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_changes_no_logit_keeps_its_value(kind):
  origin = golden(kind, **INERT)
  if kind in ("qwen3", "qwen2_moe"):
    del origin["max_window_layers"]  # there it says which layers have windows
  written = with_origin(FAMILIES, kind, read(kind, origin), origin)
  assert {key: written[key] for key in origin} == origin
  assert essence(read(kind, written)) == essence(read(kind, origin))
  old = {key: value for key, value in written.items() if key != "rope_parameters"}
  assert essence(read(kind, old)) == essence(read(kind, origin)), "as transformers 4 reads it"


@pytest.mark.parametrize(
  ("kind", "idle"),
  [
    ("qwen2_moe", {"sliding_window": 4096, "use_sliding_window": False}),
    ("qwen3_moe", {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1}),
    ("mixtral", {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None}),
    ("deepseek_v3", {"num_nextn_predict_layers": 1, "head_dim": 64, "qk_head_dim": 10}),
    ("deepseek_v2", {"aux_loss_alpha": 0.0}),
    ("llama", {"head_dim": None, "tie_word_embeddings": None, "architectures": None}),
  ],
)
def test_keys_that_do_nothing_in_a_model_keep_their_values(kind, idle):
  origin = golden(kind, **idle)
  written = with_origin(FAMILIES, kind, read(kind, origin), origin)
  if idle.pop("architectures", 0) is None:
    assert written["architectures"] == [FAMILIES[kind].architecture]
  assert {key: written[key] for key in idle} == idle


def changed(kind, origin, **fields):
  """The model of a config with other fields of its experts."""
  replace = lambda ffn: dataclasses.replace(ffn, **fields) if isinstance(ffn, MoEConfig) else ffn  # noqa: E731
  return read(kind, origin).map_ffns(replace)


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe", "gpt_oss"])
def test_of_another_number_of_experts_only_that_changes_under_all_its_names(kind):
  origin = golden(kind, **INERT)
  number = origin.pop("num_experts", None) or origin.pop("num_local_experts")
  both = {"num_experts": number, "num_local_experts": number}
  model = changed(kind, {**origin, **both}, num_experts=number + 2)
  written = with_origin(FAMILIES, kind, model, {**origin, **both})
  assert {written.get(name) for name in both} == {None, number + 2}
  assert {key: written[key] for key in origin} == origin
  assert essence(read(kind, written)) == essence(model)


def test_other_losses_than_the_origin_says_leave_what_it_says():
  origin = golden("mixtral", router_aux_loss_coef=0.25)
  for balance in ((), (LoadBalance(weight=3.0),)):
    written = with_origin(FAMILIES, "mixtral", changed("mixtral", origin, balance=balance), origin)
    assert written["router_aux_loss_coef"] == 0.25


def test_a_key_that_means_something_in_one_family_is_not_kept_where_the_model_says_otherwise():
  origin = golden("phimoe", router_jitter_noise=0.3)
  router = dataclasses.replace(
    next(ffn.router for ffn in read("phimoe", origin).ffns), band=0.7
  )
  written = with_origin(FAMILIES, "phimoe", changed("phimoe", origin, router=router), origin)
  assert written["router_jitter_noise"] == 0.7


def test_of_an_origin_of_another_family_only_what_none_reads_is_kept():
  origin = golden("llama", **INERT)
  model = read("mixtral", golden("mixtral"))
  written = with_origin(FAMILIES, "mixtral", model, origin)
  assert written["architectures"] == ["MixtralForCausalLM"]
  assert (written["use_cache"], written["eos_token_id"]) == (False, [3, 5])
  assert "unsloth_version" not in written and "attention_bias" not in written
  assert essence(read("mixtral", written)) == essence(model)


def test_without_an_origin_a_family_writes_all():
  model = read("olmoe", golden("olmoe"))
  written = with_origin(FAMILIES, "olmoe", model, {})
  assert written == {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", **FAMILIES["olmoe"].write(model)
  }
