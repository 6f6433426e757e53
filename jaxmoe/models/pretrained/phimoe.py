"""Phi-3.5-MoE (Abdin et al. 2024, arXiv:2404.14219): LayerNorm, SparseMixer, LongRoPE.

Past the original length keys turn by the long factors, as in LongRoPE (Ding et al. 2024) and the
model's own code. transformers (5.24) takes the long gain there, but turns by the short factors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmoe.models.block import BlockConfig
from jaxmoe.models.pretrained import config_keys
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.mixtral import OLD_EXPERTS
from jaxmoe.models.pretrained.model_family import ModelFamily, blocks, only_moe
from jaxmoe.models.pretrained.shared_mappings import AT, BIASES, DECODER, mapping
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers.sparse_mixer import SparseMixer


def read(config: ConfigReader) -> TransformerConfig:
  """Returns the record that a config.json describes."""
  moe = MoEConfig(
    num_experts=config.get(int, "num_local_experts", default=16),
    num_active=config.get(int, "num_experts_per_tok", default=2),
    router=SparseMixer(band=config.get(float, "router_jitter_noise", default=0.01)),
    experts=SwiGLU(mlp_dim=config.get(int, "intermediate_size")),
    balance=config_keys.balance(config, default=0.001),
  )
  window = config.get(int, "sliding_window", default=None)
  attention = config_keys.attention(config, window, theta=1e6, bias=config_keys.bias(config))
  model = config_keys.decoder(
    config, [BlockConfig(attention, moe)] * config_keys.num_layers(config), eps=1e-5
  )
  head_bias = config.get(bool, "lm_head_bias", default=False)
  return dataclasses.replace(model, norm="layer", head_bias=head_bias)


def write(model: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe, first = only_moe(model), blocks(model)[0]
  return {
    **config_keys.decoder_keys(model),
    **config_keys.attention_keys(model),
    **config_keys.balance_keys(moe),
    "attention_bias": first.attention.bias == "all",
    "intermediate_size": moe.experts.mlp_dim,
    "lm_head_bias": model.head_bias,
    "num_experts_per_tok": moe.num_active,
    "num_local_experts": moe.num_experts,
    "router_jitter_noise": moe.router.band,
    "sliding_window": config_keys.window_of(first),
  }


PHIMOE = ModelFamily(
  "PhimoeForCausalLM",
  read,
  write,
  (
    *DECODER,
    *BIASES,
    *OLD_EXPERTS,
    mapping("attention_norm/bias", "d", (AT + "input_layernorm.bias", "d")),
    mapping("ffn_norm/bias", "d", (AT + "post_attention_layernorm.bias", "d")),
    mapping("final_norm/bias", "d", ("model.norm.bias", "d")),
    mapping("head/bias", "v", ("lm_head.bias", "v")),
    mapping("moe/router/gate/weight", "d e", (AT + "block_sparse_moe.gate.weight", "e d"),
         (AT + "mlp.router.weight", "e d")),
  ),
)  # fmt: skip
