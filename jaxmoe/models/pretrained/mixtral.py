"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): the best of a softmax, renormalised."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.block import Block
from jaxmoe.models.pretrained import keys
from jaxmoe.models.pretrained.family import Family, blocks, only_moe
from jaxmoe.models.pretrained.leaves import AT, DECODER, FUSED, leaf
from jaxmoe.models.pretrained.settings import Settings
from jaxmoe.models.pretrained.tensors import Form, Leaf
from jaxmoe.models.transformer import Transformer
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoE
from jaxmoe.moe.routers import TopK

OLD = AT + "block_sparse_moe."


def read(settings: Settings) -> Transformer:
  """Returns the record that a config.json describes."""
  window = settings.get(int, "sliding_window", default=None)
  moe = MoE(
    num_experts=settings.get(int, "num_local_experts", default=8),
    num_active=settings.get(int, "num_experts_per_tok", default=2),
    router=TopK(normalize=True),
    experts=SwiGLU(hidden=settings.get(int, "intermediate_size")),
    balance=keys.balance(settings, default=0.001),
  )
  block = Block(keys.attention(settings, window=window, theta=1e6), moe)
  return keys.decoder(settings, [block] * keys.num_layers(settings), eps=1e-5)


def write(model: Transformer) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe = only_moe(model)
  return {
    **keys.decoder_keys(model),
    **keys.attention_keys(model),
    **keys.balance_keys(moe),
    "intermediate_size": moe.experts.hidden,
    "num_experts_per_tok": moe.num_active,
    "num_local_experts": moe.num_experts,
    "sliding_window": keys.window_of(blocks(model)[0]),
  }


OLD_EXPERTS = (
  Leaf(
    "moe/experts/gate_up",
    "e d g f",
    (
      Form(OLD + "experts.{e}.{g}.weight", "f d", (("g", ("w1", "w3")),)),
      Form(FUSED[0], "e (g f) d"),
    ),
  ),
  leaf("moe/experts/down", "e f d", (OLD + "experts.{e}.w2.weight", "d f"), (FUSED[1], "e d f")),
)
GATE = leaf(
  "moe/router/gate/weight", "d e", (OLD + "gate.weight", "e d"), (AT + "mlp.gate.weight", "e d")
)
MIXTRAL = Family("MixtralForCausalLM", read, write, (*DECODER, GATE, *OLD_EXPERTS))
