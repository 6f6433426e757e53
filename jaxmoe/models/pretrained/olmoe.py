"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): queries and keys normed over all heads."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.block import BlockConfig
from jaxmoe.models.pretrained import config_keys
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.model_family import ModelFamily, blocks, only_moe
from jaxmoe.models.pretrained.shared_mappings import AT, BIASES, DECODER, EXPERTS, GATE, mapping
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK


def read(config: ConfigReader) -> TransformerConfig:
  """Returns the record that a config.json describes."""
  moe = MoEConfig(
    num_experts=config.get(int, "num_experts", "num_local_experts", default=64),
    num_active=config.get(int, "num_experts_per_tok", default=8),
    router=TopK(normalize=config.get(bool, "norm_topk_prob", default=False)),
    experts=SwiGLU(mlp_dim=config.get(int, "intermediate_size")),
    balance=config_keys.balance(config, default=0.01),
  )
  attention = config_keys.attention(
    config, qk_norm="all", bias=config_keys.bias(config),
    clip=config.get(float, "clip_qkv", default=None),
  )  # fmt: skip
  return config_keys.decoder(
    config, [BlockConfig(attention, moe)] * config_keys.num_layers(config), eps=1e-5
  )


def write(model: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe, attention = only_moe(model), blocks(model)[0].attention
  return {
    **config_keys.decoder_keys(model),
    **config_keys.attention_keys(model),
    **config_keys.balance_keys(moe),
    "attention_bias": attention.bias == "all",
    "clip_qkv": attention.clip,
    "intermediate_size": moe.experts.mlp_dim,
    "norm_topk_prob": moe.router.normalize,
    "num_experts": moe.num_experts,
    "num_experts_per_tok": moe.num_active,
  }


NORMS = (
  mapping("attention/q_norm/scale", "n h", (AT + "self_attn.q_norm.weight", "(n h)")),
  mapping("attention/k_norm/scale", "k h", (AT + "self_attn.k_norm.weight", "(k h)")),
)
OLMOE = ModelFamily("OlmoeForCausalLM", read, write, DECODER + NORMS + BIASES + GATE + EXPERTS)
