"""Qwen3 without experts (arXiv:2505.09388): queries and keys normed by head, windows by layer."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.block import MLP as DenseMLP
from jaxmoe.models.block import Block
from jaxmoe.models.pretrained import keys
from jaxmoe.models.pretrained.family import Family, blocks, only_mlp
from jaxmoe.models.pretrained.leaves import BIASES, DECODER, MLP, QK_NORMS
from jaxmoe.models.pretrained.settings import Settings
from jaxmoe.models.transformer import Transformer


def read(settings: Settings) -> Transformer:
  """Returns the record that a config.json describes."""
  mlp = DenseMLP(settings.get(int, "intermediate_size"))
  layers = [
    Block(keys.attention(settings, window, qk_norm="head", bias=keys.bias(settings)), mlp)
    for window in keys.windows(settings, after=28)
  ]
  return keys.decoder(settings, layers, eps=1e-6)


def write(model: Transformer) -> dict[str, Any]:
  """Returns the keys of config.json."""
  mlp = only_mlp(model)
  return {
    **keys.decoder_keys(model),
    **keys.attention_keys(model),
    **keys.windows_keys(model),
    "attention_bias": blocks(model)[0].attention.bias == "all",
    "intermediate_size": mlp.hidden if mlp else None,
  }


QWEN3 = Family("Qwen3ForCausalLM", read, write, DECODER + BIASES + QK_NORMS + MLP)
