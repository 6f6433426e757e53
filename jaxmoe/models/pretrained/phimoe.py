"""Phi-3.5-MoE (Abdin et al. 2024, arXiv:2404.14219): LayerNorm, SparseMixer, LongRoPE.

Past the original length keys turn by the long factors, as in LongRoPE (Ding et al. 2024) and the
model's own code. transformers (5.24) takes the long gain there, but turns by the short factors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmoe.models.block import Block
from jaxmoe.models.pretrained import keys
from jaxmoe.models.pretrained.family import Family, blocks, only_moe
from jaxmoe.models.pretrained.leaves import AT, BIASES, DECODER, leaf
from jaxmoe.models.pretrained.mixtral import OLD_EXPERTS
from jaxmoe.models.pretrained.settings import Settings
from jaxmoe.models.transformer import Transformer
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoE
from jaxmoe.moe.routers.sparse_mixer import SparseMixer


def read(settings: Settings) -> Transformer:
  """Returns the record that a config.json describes."""
  moe = MoE(
    num_experts=settings.get(int, "num_local_experts", default=16),
    num_active=settings.get(int, "num_experts_per_tok", default=2),
    router=SparseMixer(band=settings.get(float, "router_jitter_noise", default=0.01)),
    experts=SwiGLU(hidden=settings.get(int, "intermediate_size")),
    balance=keys.balance(settings, default=0.001),
  )
  window = settings.get(int, "sliding_window", default=None)
  attention = keys.attention(settings, window, theta=1e6, bias=keys.bias(settings))
  model = keys.decoder(settings, [Block(attention, moe)] * keys.num_layers(settings), eps=1e-5)
  head_bias = settings.get(bool, "lm_head_bias", default=False)
  return dataclasses.replace(model, norm="layer", head_bias=head_bias)


def write(model: Transformer) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe, first = only_moe(model), blocks(model)[0]
  return {
    **keys.decoder_keys(model),
    **keys.attention_keys(model),
    **keys.balance_keys(moe),
    "attention_bias": first.attention.bias == "all",
    "intermediate_size": moe.experts.hidden,
    "lm_head_bias": model.head_bias,
    "num_experts_per_tok": moe.num_active,
    "num_local_experts": moe.num_experts,
    "router_jitter_noise": moe.router.band,
    "sliding_window": keys.window_of(first),
  }


PHIMOE = Family(
  "PhimoeForCausalLM",
  read,
  write,
  (
    *DECODER,
    *BIASES,
    *OLD_EXPERTS,
    leaf("attention_norm/bias", "d", (AT + "input_layernorm.bias", "d")),
    leaf("ffn_norm/bias", "d", (AT + "post_attention_layernorm.bias", "d")),
    leaf("final_norm/bias", "d", ("model.norm.bias", "d")),
    leaf("head/bias", "v", ("lm_head.bias", "v")),
    leaf("moe/router/gate/weight", "d e", (AT + "block_sparse_moe.gate.weight", "e d"),
         (AT + "mlp.router.weight", "e d")),
  ),
)  # fmt: skip
