"""Granite 3 MoE (IBM 2024): what enters, leaves and is added to the stream is scaled."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmoe.models.block import BlockConfig
from jaxmoe.models.pretrained import config_keys
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.model_family import ModelFamily, blocks, only_moe
from jaxmoe.models.pretrained.shared_mappings import AT, BIASES, DECODER, mapping
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK

SPARSE = AT + "block_sparse_moe."


def read(config: ConfigReader) -> TransformerConfig:
  """Returns the record that a config.json describes."""
  moe = MoEConfig(
    num_experts=config.get(int, "num_local_experts", default=8),
    num_active=config.get(int, "num_experts_per_tok", default=2),
    router=TopK(normalize=True),
    experts=SwiGLU(mlp_dim=config.get(int, "intermediate_size")),
    balance=config_keys.balance(config, default=0.001),
  )
  attention = config_keys.attention(
    config, bias=config_keys.bias(config),
    scale=config.get(float, "attention_multiplier", default=1.0),
  )  # fmt: skip
  model = config_keys.decoder(
    config, [BlockConfig(attention, moe)] * config_keys.num_layers(config), eps=1e-6
  )
  return dataclasses.replace(
    model,
    embed_scale=config.get(float, "embedding_multiplier", default=1.0),
    residual_scale=config.get(float, "residual_multiplier", default=1.0),
    logit_scale=1 / config.get(float, "logits_scaling", default=1.0),
  )


def write(model: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe, attention = only_moe(model), blocks(model)[0].attention
  scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
  return {
    **config_keys.decoder_keys(model),
    **config_keys.attention_keys(model),
    **config_keys.balance_keys(moe),
    "attention_bias": attention.bias == "all",
    "attention_multiplier": scale,
    "embedding_multiplier": model.embed_scale,
    "intermediate_size": moe.experts.mlp_dim,
    "logits_scaling": _inverse(model.logit_scale),
    "num_experts_per_tok": moe.num_active,
    "num_local_experts": moe.num_experts,
    "residual_multiplier": model.residual_scale,
  }


def _inverse(number: float) -> float:
  """Returns the number whose inverse is given, the shortest one where several are."""
  short = float(f"{1 / number:.12g}")
  return short if 1 / short == number else 1 / number


GRANITEMOE = ModelFamily(
  "GraniteMoeForCausalLM",
  read,
  write,
  (
    *DECODER,
    *BIASES,
    mapping("moe/router/gate/weight", "d e", (SPARSE + "router.layer.weight", "e d"),
         (SPARSE + "router.weight", "e d")),
    mapping("moe/experts/gate_up", "e d g f", (SPARSE + "input_linear.weight", "e (g f) d"),
         (SPARSE + "experts.gate_up_proj", "e (g f) d")),
    mapping("moe/experts/down", "e f d", (SPARSE + "output_linear.weight", "e d f"),
         (SPARSE + "experts.down_proj", "e d f")),
  ),
)  # fmt: skip
