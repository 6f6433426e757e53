"""gpt-oss (OpenAI 2025, arXiv:2508.10925): sinks, windows in every other layer, biases, limits."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.block import BlockConfig
from jaxmoe.models.pretrained import config_keys
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.model_family import ModelFamily, blocks, only_moe
from jaxmoe.models.pretrained.shared_mappings import AT, BIASES, DECODER, mapping
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.experts.clamped_swiglu import ClampedSwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.gates import LinearGateConfig


def read(config: ConfigReader) -> TransformerConfig:
  """Returns the record that a config.json describes."""
  config.get(dict, "rope_parameters", "rope_scaling")  # without, transformers takes a YaRN
  moe = MoEConfig(
    num_experts=config.get(int, "num_local_experts", "num_experts", default=128),
    num_active=config.get(int, "num_experts_per_tok", "experts_per_token", default=4),
    router=TopK(gate=LinearGateConfig(bias=True), normalize=True),
    experts=ClampedSwiGLU(
      mlp_dim=config.get(int, "intermediate_size"),
      limit=config.get(float, "swiglu_limit", default=7.0),
      alpha=config.get(float, "swiglu_alpha", default=1.702),
    ),
    balance=config_keys.balance(config, default=0.001),
  )
  kinds = config.get(list, "layer_types", default=None)
  if kinds is None:
    depths = range(config_keys.num_layers(config))
    kinds = ["full_attention" if depth % 2 else "sliding_attention" for depth in depths]
  size = config.get(int, "sliding_window", default=128)
  bias = "all" if config.get(bool, "attention_bias", default=True) else "none"
  layers = [
    BlockConfig(config_keys.attention(config, window, theta=150_000.0, bias=bias, sinks=True), moe)
    for window in config_keys.windows_of_types(config, kinds, size)
  ]
  config.skip("initial_context_length")
  return config_keys.decoder(config, layers, eps=1e-5)


def write(model: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe = only_moe(model)
  attention = config_keys.attention_keys(model)
  if attention["rope_scaling"] is None:
    attention["rope_scaling"] = {"rope_type": "default"}
  windows = config_keys.windows_keys(model)
  full = ["full_attention"] * model.num_layers
  return {
    **config_keys.decoder_keys(model),
    **attention,
    **config_keys.balance_keys(moe),
    "attention_bias": blocks(model)[0].attention.bias == "all",
    "intermediate_size": moe.experts.mlp_dim,
    "layer_types": windows.get("layer_types", full),
    "num_experts_per_tok": moe.num_active,
    "num_local_experts": moe.num_experts,
    "sliding_window": windows["sliding_window"],
    "swiglu_alpha": moe.experts.alpha,
    "swiglu_limit": moe.experts.limit,
  }


MLP = AT + "mlp."
GPT_OSS = ModelFamily(
  "GptOssForCausalLM",
  read,
  write,
  (
    *DECODER,
    *BIASES,
    mapping("attention/sink_bias", "n", (AT + "self_attn.sinks", "n")),
    mapping("moe/router/gate/weight", "d e", (MLP + "router.weight", "e d")),
    mapping("moe/router/gate/bias", "e", (MLP + "router.bias", "e")),
    mapping("moe/experts/gate_up", "e d g f", (MLP + "experts.gate_up_proj", "e d (f g)")),
    mapping("moe/experts/gate_up_bias", "e g f", (MLP + "experts.gate_up_proj_bias", "e (f g)")),
    mapping("moe/experts/down", "e f d", (MLP + "experts.down_proj", "e f d")),
    mapping("moe/experts/down_bias", "e d", (MLP + "experts.down_proj_bias", "e d")),
  ),
)
