"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): queries and keys normed over all heads."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.block import Block
from jaxmoe.models.pretrained import keys
from jaxmoe.models.pretrained.family import Family, blocks, only_moe
from jaxmoe.models.pretrained.leaves import AT, BIASES, DECODER, EXPERTS, GATE, leaf
from jaxmoe.models.pretrained.settings import Settings
from jaxmoe.models.transformer import Transformer
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoE
from jaxmoe.moe.routers import TopK


def read(settings: Settings) -> Transformer:
  """Returns the record that a config.json describes."""
  moe = MoE(
    num_experts=settings.get(int, "num_experts", "num_local_experts", default=64),
    num_active=settings.get(int, "num_experts_per_tok", default=8),
    router=TopK(normalize=settings.get(bool, "norm_topk_prob", default=False)),
    experts=SwiGLU(hidden=settings.get(int, "intermediate_size")),
    balance=keys.balance(settings, default=0.01),
  )
  attention = keys.attention(
    settings, qk_norm="all", bias=keys.bias(settings),
    clip=settings.get(float, "clip_qkv", default=None),
  )  # fmt: skip
  return keys.decoder(settings, [Block(attention, moe)] * keys.num_layers(settings), eps=1e-5)


def write(model: Transformer) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe, attention = only_moe(model), blocks(model)[0].attention
  return {
    **keys.decoder_keys(model),
    **keys.attention_keys(model),
    **keys.balance_keys(moe),
    "attention_bias": attention.bias == "all",
    "clip_qkv": attention.clip,
    "intermediate_size": moe.experts.hidden,
    "norm_topk_prob": moe.router.normalize,
    "num_experts": moe.num_experts,
    "num_experts_per_tok": moe.num_active,
  }


NORMS = (
  leaf("attention/q_norm/scale", "n h", (AT + "self_attn.q_norm.weight", "(n h)")),
  leaf("attention/k_norm/scale", "k h", (AT + "self_attn.k_norm.weight", "(k h)")),
)
OLMOE = Family("OlmoeForCausalLM", read, write, DECODER + NORMS + BIASES + GATE + EXPERTS)
