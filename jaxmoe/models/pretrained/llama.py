"""Llama (Touvron et al. 2023, arXiv:2302.13971; Dubey et al. 2024, arXiv:2407.21783): dense."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.block import MLP as DenseMLP
from jaxmoe.models.block import Block
from jaxmoe.models.pretrained import keys
from jaxmoe.models.pretrained.family import Family, blocks, only_mlp
from jaxmoe.models.pretrained.leaves import BIASES, DECODER, MLP
from jaxmoe.models.pretrained.settings import Settings
from jaxmoe.models.transformer import Transformer


def read(settings: Settings) -> Transformer:
  """Returns the record that a config.json describes."""
  settings.only("mlp_bias", False)
  block = Block(
    keys.attention(settings, bias=keys.bias(settings)),
    DenseMLP(settings.get(int, "intermediate_size")),
  )
  return keys.decoder(settings, [block] * keys.num_layers(settings), eps=1e-6)


def write(model: Transformer) -> dict[str, Any]:
  """Returns the keys of config.json."""
  mlp = only_mlp(model)
  return {
    **keys.decoder_keys(model),
    **keys.attention_keys(model),
    "attention_bias": blocks(model)[0].attention.bias == "all",
    "intermediate_size": mlp.hidden if mlp else None,
    "mlp_bias": False,
  }


LLAMA = Family("LlamaForCausalLM", read, write, DECODER + BIASES + MLP)
