"""Qwen3-MoE (Qwen3 report 2025, arXiv:2505.09388): queries and keys normed by head."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.block import BlockConfig
from jaxmoe.models.block import MLPConfig as DenseMLP
from jaxmoe.models.pretrained import config_keys
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.model_family import ModelFamily, blocks, only_mlp, only_moe
from jaxmoe.models.pretrained.shared_mappings import BIASES, DECODER, EXPERTS, GATE, MLP, QK_NORMS
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK


def read(config: ConfigReader) -> TransformerConfig:
  """Returns the record that a config.json describes."""
  config.skip("max_window_layers")
  window = config.get(int, "sliding_window", default=None)
  used = config.get(bool, "use_sliding_window", default=False)
  attention = config_keys.attention(
    config, window if used else None, qk_norm="head", bias=config_keys.bias(config)
  )
  moe = MoEConfig(
    num_experts=config.get(int, "num_experts", "num_local_experts", default=128),
    num_active=config.get(int, "num_experts_per_tok", default=8),
    router=TopK(normalize=config.get(bool, "norm_topk_prob", default=False)),
    experts=SwiGLU(mlp_dim=config.get(int, "moe_intermediate_size")),
    balance=config_keys.balance(config, default=0.001),
  )
  dense = config_keys.dense_layers(config)
  width = config.get(int, "intermediate_size", default=6144)
  mlp = DenseMLP(width)
  return config_keys.decoder(
    config, [BlockConfig(attention, mlp if of else moe) for of in dense], eps=1e-6
  )


def write(model: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe, mlp, window = only_moe(model), only_mlp(model), config_keys.window_of(blocks(model)[0])
  return {
    **config_keys.decoder_keys(model),
    **config_keys.attention_keys(model),
    **config_keys.balance_keys(moe),
    **config_keys.dense_layers_keys(model),
    "attention_bias": blocks(model)[0].attention.bias == "all",
    "intermediate_size": mlp.mlp_dim if mlp else moe.experts.mlp_dim,
    "moe_intermediate_size": moe.experts.mlp_dim,
    "norm_topk_prob": moe.router.normalize,
    "num_experts": moe.num_experts,
    "num_experts_per_tok": moe.num_active,
    "sliding_window": window,
    "use_sliding_window": window is not None,
  }


LEAVES = DECODER + BIASES + QK_NORMS + GATE + EXPERTS + MLP
QWEN3_MOE = ModelFamily("Qwen3MoeForCausalLM", read, write, LEAVES)
