"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): a shared expert behind a gate of its own."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.block import BlockConfig
from jaxmoe.models.block import MLPConfig as DenseMLP
from jaxmoe.models.pretrained import config_keys
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.model_family import ModelFamily, blocks, only_mlp, only_moe
from jaxmoe.models.pretrained.shared_mappings import (
  AT,
  BIASES,
  DECODER,
  EXPERTS,
  GATE,
  MLP,
  mapping,
)
from jaxmoe.models.pretrained.tensor_mapping import GATE_UP, ParamMapping, TensorLayout
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK

SHARED = AT + "mlp.shared_expert."


def read(config: ConfigReader) -> TransformerConfig:
  """Returns the record that a config.json describes."""
  bias = "qkv" if config.get(bool, "qkv_bias", default=True) else "none"
  moe = MoEConfig(
    num_experts=config.get(int, "num_experts", "num_local_experts", default=60),
    num_active=config.get(int, "num_experts_per_tok", default=4),
    router=TopK(normalize=config.get(bool, "norm_topk_prob", default=False)),
    experts=SwiGLU(mlp_dim=config.get(int, "moe_intermediate_size")),
    shared_mlp_dim=config.get(int, "shared_expert_intermediate_size"),
    shared_gate=True,
    balance=config_keys.balance(config, default=0.001),
  )
  mlp = DenseMLP(config.get(int, "intermediate_size", default=5632))
  layers = [
    BlockConfig(config_keys.attention(config, window, bias=bias), mlp if dense else moe)
    for window, dense in zip(windows(config), config_keys.dense_layers(config))
  ]
  return config_keys.decoder(config, layers, eps=1e-6)


def windows(config: ConfigReader) -> list[int | None]:
  """Returns the window of each block; where no list says it, every other one of the first has it.
  """
  size = config.get(int, "sliding_window", default=4096)
  used = config.get(bool, "use_sliding_window", default=False)
  first = config.get(int, "max_window_layers", default=28)
  kinds = config.get(list, "layer_types", default=None)
  if kinds is None:
    kinds = [
      "sliding_attention" if used and depth % 2 == 0 and depth < first else "full_attention"
      for depth in range(config_keys.num_layers(config))
    ]
  return config_keys.windows_of_types(config, kinds, size if used else None)


def write(model: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe, mlp = only_moe(model), only_mlp(model)
  return {
    **config_keys.decoder_keys(model),
    **config_keys.attention_keys(model),
    **config_keys.balance_keys(moe),
    **config_keys.dense_layers_keys(model),
    **config_keys.windows_keys(model),
    "intermediate_size": mlp.mlp_dim if mlp else moe.experts.mlp_dim,
    "moe_intermediate_size": moe.experts.mlp_dim,
    "norm_topk_prob": moe.router.normalize,
    "num_experts": moe.num_experts,
    "num_experts_per_tok": moe.num_active,
    "qkv_bias": blocks(model)[0].attention.bias == "qkv",
    "shared_expert_intermediate_size": moe.shared_mlp_dim,
  }


QWEN2_MOE = ModelFamily(
  "Qwen2MoeForCausalLM",
  read,
  write,
  (
    *DECODER, *BIASES, *GATE, *EXPERTS, *MLP,
    ParamMapping(
      "moe/shared/gate_up", "d g f", (TensorLayout(SHARED + "{g}_proj.weight", "f d", GATE_UP),)
    ),
    mapping("moe/shared/down", "f d", (SHARED + "down_proj.weight", "d f")),
    mapping("moe/shared_gate", "d g", (AT + "mlp.shared_expert_gate.weight", "g d")),
  ),
)  # fmt: skip
