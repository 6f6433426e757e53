"""Llama (Touvron et al. 2023, arXiv:2302.13971; Dubey et al. 2024, arXiv:2407.21783): dense."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.block import BlockConfig
from jaxmoe.models.block import MLPConfig as DenseMLP
from jaxmoe.models.pretrained import config_keys
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.model_family import ModelFamily, blocks, only_mlp
from jaxmoe.models.pretrained.shared_mappings import BIASES, DECODER, MLP
from jaxmoe.models.transformer import TransformerConfig


def read(config: ConfigReader) -> TransformerConfig:
  """Returns the record that a config.json describes."""
  config.only("mlp_bias", False)
  block = BlockConfig(
    config_keys.attention(config, bias=config_keys.bias(config)),
    DenseMLP(config.get(int, "intermediate_size")),
  )
  return config_keys.decoder(config, [block] * config_keys.num_layers(config), eps=1e-6)


def write(model: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of config.json."""
  mlp = only_mlp(model)
  return {
    **config_keys.decoder_keys(model),
    **config_keys.attention_keys(model),
    "attention_bias": blocks(model)[0].attention.bias == "all",
    "intermediate_size": mlp.mlp_dim if mlp else None,
    "mlp_bias": False,
  }


LLAMA = ModelFamily("LlamaForCausalLM", read, write, DECODER + BIASES + MLP)
