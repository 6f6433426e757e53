"""Mappings of parameters that families share, in groups.

The names are what llama's descendants call the parts of a decoder.
"""

from __future__ import annotations

from jaxmoe.models.pretrained.tensor_mapping import GATE_UP, ParamMapping, TensorLayout

AT = "model.layers.{layer}."


def mapping(name: str, dims: str, *layouts: tuple[str, str]) -> ParamMapping:
  """Returns an entry whose layouts need no names of indices."""
  return ParamMapping(name, dims, tuple(TensorLayout(*layout) for layout in layouts))


ENDS = (
  mapping("embed/table", "v d", ("model.embed_tokens.weight", "v d")),
  mapping("final_norm/scale", "d", ("model.norm.weight", "d")),
  mapping("head/weight", "d v", ("lm_head.weight", "v d")),
)
NORMS = (
  mapping("attention_norm/scale", "d", (AT + "input_layernorm.weight", "d")),
  mapping("ffn_norm/scale", "d", (AT + "post_attention_layernorm.weight", "d")),
)
ATTENTION = (
  mapping("attention/q", "d n h", (AT + "self_attn.q_proj.weight", "(n h) d")),
  mapping("attention/k", "d k h", (AT + "self_attn.k_proj.weight", "(k h) d")),
  mapping("attention/v", "d k h", (AT + "self_attn.v_proj.weight", "(k h) d")),
  mapping("attention/o", "n h d", (AT + "self_attn.o_proj.weight", "d (n h)")),
)
BIASES = (
  mapping("attention/q_bias", "n h", (AT + "self_attn.q_proj.bias", "(n h)")),
  mapping("attention/k_bias", "k h", (AT + "self_attn.k_proj.bias", "(k h)")),
  mapping("attention/v_bias", "k h", (AT + "self_attn.v_proj.bias", "(k h)")),
  mapping("attention/o_bias", "d", (AT + "self_attn.o_proj.bias", "d")),
)
QK_NORMS = (
  mapping("attention/q_norm/scale", "h", (AT + "self_attn.q_norm.weight", "h")),
  mapping("attention/k_norm/scale", "h", (AT + "self_attn.k_norm.weight", "h")),
)
DECODER = ENDS + NORMS + ATTENTION
GATE = (mapping("moe/router/gate/weight", "d e", (AT + "mlp.gate.weight", "e d")),)
MLP = (
  ParamMapping("mlp/gate_up", "d g f", (TensorLayout(AT + "mlp.{g}_proj.weight", "f d", GATE_UP),)),
  mapping("mlp/down", "f d", (AT + "mlp.down_proj.weight", "d f")),
)
FUSED = AT + "mlp.experts.gate_up_proj", AT + "mlp.experts.down_proj"
"""What transformers 5 calls the experts of a layer where it writes them in one (E, 2F, D)."""
EXPERTS = (
  ParamMapping(
    "moe/experts/gate_up",
    "e d g f",
    (
      TensorLayout(AT + "mlp.experts.{e}.{g}_proj.weight", "f d", GATE_UP),
      TensorLayout(FUSED[0], "e (g f) d"),
    ),
  ),
  mapping(
    "moe/experts/down", "e f d",
    (AT + "mlp.experts.{e}.down_proj.weight", "d f"), (FUSED[1], "e d f"),
  ),
)  # fmt: skip
