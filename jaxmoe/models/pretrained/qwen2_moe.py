"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): a shared expert behind a gate of its own."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.block import MLP as DenseMLP
from jaxmoe.models.block import Block
from jaxmoe.models.pretrained import keys
from jaxmoe.models.pretrained.family import Family, blocks, only_mlp, only_moe
from jaxmoe.models.pretrained.leaves import AT, BIASES, DECODER, EXPERTS, GATE, MLP, leaf
from jaxmoe.models.pretrained.settings import Settings
from jaxmoe.models.pretrained.tensors import GATE_UP, Form, Leaf
from jaxmoe.models.transformer import Transformer
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoE
from jaxmoe.moe.routers import TopK

SHARED = AT + "mlp.shared_expert."


def read(settings: Settings) -> Transformer:
  """Returns the record that a config.json describes."""
  bias = "qkv" if settings.get(bool, "qkv_bias", default=True) else "none"
  moe = MoE(
    num_experts=settings.get(int, "num_experts", "num_local_experts", default=60),
    num_active=settings.get(int, "num_experts_per_tok", default=4),
    router=TopK(normalize=settings.get(bool, "norm_topk_prob", default=False)),
    experts=SwiGLU(hidden=settings.get(int, "moe_intermediate_size")),
    shared_hidden=settings.get(int, "shared_expert_intermediate_size"),
    shared_gate=True,
    balance=keys.balance(settings, default=0.001),
  )
  mlp = DenseMLP(settings.get(int, "intermediate_size", default=5632))
  layers = [
    Block(keys.attention(settings, window, bias=bias), mlp if dense else moe)
    for window, dense in zip(windows(settings), keys.dense_layers(settings))
  ]
  return keys.decoder(settings, layers, eps=1e-6)


def windows(settings: Settings) -> list[int | None]:
  """Returns the window of each block; where no list says it, every other one of the first has it.
  """
  size = settings.get(int, "sliding_window", default=4096)
  used = settings.get(bool, "use_sliding_window", default=False)
  first = settings.get(int, "max_window_layers", default=28)
  kinds = settings.get(list, "layer_types", default=None)
  if kinds is None:
    kinds = [
      "sliding_attention" if used and depth % 2 == 0 and depth < first else "full_attention"
      for depth in range(keys.num_layers(settings))
    ]
  return keys.windows_of_types(settings, kinds, size if used else None)


def write(model: Transformer) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe, mlp = only_moe(model), only_mlp(model)
  return {
    **keys.decoder_keys(model),
    **keys.attention_keys(model),
    **keys.balance_keys(moe),
    **keys.dense_layers_keys(model),
    **keys.windows_keys(model),
    "intermediate_size": mlp.hidden if mlp else moe.experts.hidden,
    "moe_intermediate_size": moe.experts.hidden,
    "norm_topk_prob": moe.router.normalize,
    "num_experts": moe.num_experts,
    "num_experts_per_tok": moe.num_active,
    "qkv_bias": blocks(model)[0].attention.bias == "qkv",
    "shared_expert_intermediate_size": moe.shared_hidden,
  }


QWEN2_MOE = Family(
  "Qwen2MoeForCausalLM",
  read,
  write,
  (
    *DECODER, *BIASES, *GATE, *EXPERTS, *MLP,
    Leaf("moe/shared/gate_up", "d g f", (Form(SHARED + "{g}_proj.weight", "f d", GATE_UP),)),
    leaf("moe/shared/down", "f d", (SHARED + "down_proj.weight", "d f")),
    leaf("moe/shared_gate", "d g", (AT + "mlp.shared_expert_gate.weight", "g d")),
  ),
)  # fmt: skip
