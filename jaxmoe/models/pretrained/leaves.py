"""Names that families share, in groups: what llama's descendants call the parts of a decoder."""

from __future__ import annotations

from jaxmoe.models.pretrained.tensors import GATE_UP, Form, Leaf

AT = "model.layers.{layer}."


def leaf(name: str, dims: str, *forms: tuple[str, str]) -> Leaf:
  """Returns an entry whose forms need no words."""
  return Leaf(name, dims, tuple(Form(*form) for form in forms))


ENDS = (
  leaf("embed/table", "v d", ("model.embed_tokens.weight", "v d")),
  leaf("final_norm/scale", "d", ("model.norm.weight", "d")),
  leaf("head/weight", "d v", ("lm_head.weight", "v d")),
)
NORMS = (
  leaf("attention_norm/scale", "d", (AT + "input_layernorm.weight", "d")),
  leaf("ffn_norm/scale", "d", (AT + "post_attention_layernorm.weight", "d")),
)
ATTENTION = (
  leaf("attention/q", "d n h", (AT + "self_attn.q_proj.weight", "(n h) d")),
  leaf("attention/k", "d k h", (AT + "self_attn.k_proj.weight", "(k h) d")),
  leaf("attention/v", "d k h", (AT + "self_attn.v_proj.weight", "(k h) d")),
  leaf("attention/o", "n h d", (AT + "self_attn.o_proj.weight", "d (n h)")),
)
BIASES = (
  leaf("attention/q_bias", "n h", (AT + "self_attn.q_proj.bias", "(n h)")),
  leaf("attention/k_bias", "k h", (AT + "self_attn.k_proj.bias", "(k h)")),
  leaf("attention/v_bias", "k h", (AT + "self_attn.v_proj.bias", "(k h)")),
  leaf("attention/o_bias", "d", (AT + "self_attn.o_proj.bias", "d")),
)
QK_NORMS = (
  leaf("attention/q_norm/scale", "h", (AT + "self_attn.q_norm.weight", "h")),
  leaf("attention/k_norm/scale", "h", (AT + "self_attn.k_norm.weight", "h")),
)
DECODER = ENDS + NORMS + ATTENTION
GATE = (leaf("moe/router/gate/weight", "d e", (AT + "mlp.gate.weight", "e d")),)
MLP = (
  Leaf("mlp/gate_up", "d g f", (Form(AT + "mlp.{g}_proj.weight", "f d", GATE_UP),)),
  leaf("mlp/down", "f d", (AT + "mlp.down_proj.weight", "d f")),
)
FUSED = AT + "mlp.experts.gate_up_proj", AT + "mlp.experts.down_proj"
"""What transformers 5 calls the experts of a layer where it writes them in one (E, 2F, D)."""
EXPERTS = (
  Leaf(
    "moe/experts/gate_up",
    "e d g f",
    (
      Form(AT + "mlp.experts.{e}.{g}_proj.weight", "f d", GATE_UP),
      Form(FUSED[0], "e (g f) d"),
    ),
  ),
  leaf(
    "moe/experts/down", "e f d",
    (AT + "mlp.experts.{e}.down_proj.weight", "d f"), (FUSED[1], "e d f"),
  ),
)  # fmt: skip
