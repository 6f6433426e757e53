"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): the best of a softmax, renormalised."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.block import BlockConfig
from jaxmoe.models.pretrained import config_keys
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.model_family import ModelFamily, blocks, only_moe
from jaxmoe.models.pretrained.shared_mappings import AT, DECODER, FUSED, mapping
from jaxmoe.models.pretrained.tensor_mapping import ParamMapping, TensorLayout
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK

OLD = AT + "block_sparse_moe."


def read(config: ConfigReader) -> TransformerConfig:
  """Returns the record that a config.json describes."""
  window = config.get(int, "sliding_window", default=None)
  moe = MoEConfig(
    num_experts=config.get(int, "num_local_experts", default=8),
    num_active=config.get(int, "num_experts_per_tok", default=2),
    router=TopK(normalize=True),
    experts=SwiGLU(mlp_dim=config.get(int, "intermediate_size")),
    balance=config_keys.balance(config, default=0.001),
  )
  block = BlockConfig(config_keys.attention(config, window=window, theta=1e6), moe)
  return config_keys.decoder(config, [block] * config_keys.num_layers(config), eps=1e-5)


def write(model: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe = only_moe(model)
  return {
    **config_keys.decoder_keys(model),
    **config_keys.attention_keys(model),
    **config_keys.balance_keys(moe),
    "intermediate_size": moe.experts.mlp_dim,
    "num_experts_per_tok": moe.num_active,
    "num_local_experts": moe.num_experts,
    "sliding_window": config_keys.window_of(blocks(model)[0]),
  }


OLD_EXPERTS = (
  ParamMapping(
    "moe/experts/gate_up",
    "e d g f",
    (
      TensorLayout(OLD + "experts.{e}.{g}.weight", "f d", (("g", ("w1", "w3")),)),
      TensorLayout(FUSED[0], "e (g f) d"),
    ),
  ),
  mapping("moe/experts/down", "e f d", (OLD + "experts.{e}.w2.weight", "d f"), (FUSED[1], "e d f")),
)
GATE = mapping(
  "moe/router/gate/weight", "d e", (OLD + "gate.weight", "e d"), (AT + "mlp.gate.weight", "e d")
)
MIXTRAL = ModelFamily("MixtralForCausalLM", read, write, (*DECODER, GATE, *OLD_EXPERTS))
