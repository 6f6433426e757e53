"""Qwen3 without experts (arXiv:2505.09388): queries and keys normed by head, windows by layer."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.block import BlockConfig
from jaxmoe.models.block import MLPConfig as DenseMLP
from jaxmoe.models.pretrained import config_keys
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.model_family import ModelFamily, blocks, only_mlp
from jaxmoe.models.pretrained.shared_mappings import BIASES, DECODER, MLP, QK_NORMS
from jaxmoe.models.transformer import TransformerConfig


def read(config: ConfigReader) -> TransformerConfig:
  """Returns the record that a config.json describes."""
  mlp = DenseMLP(config.get(int, "intermediate_size"))
  layers = [
    BlockConfig(
      config_keys.attention(config, window, qk_norm="head", bias=config_keys.bias(config)), mlp
    )
    for window in config_keys.windows(config, after=28)
  ]
  return config_keys.decoder(config, layers, eps=1e-6)


def write(model: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of config.json."""
  mlp = only_mlp(model)
  return {
    **config_keys.decoder_keys(model),
    **config_keys.attention_keys(model),
    **config_keys.windows_keys(model),
    "attention_bias": blocks(model)[0].attention.bias == "all",
    "intermediate_size": mlp.mlp_dim if mlp else None,
  }


QWEN3 = ModelFamily("Qwen3ForCausalLM", read, write, DECODER + BIASES + QK_NORMS + MLP)
