"""A Qwen3-MoE checkpoint as the file that llama.cpp reads (GGUF), in float32.

The names and keys are those of llama.cpp's own converter (`convert_hf_to_gguf.py`). Ids are all
that is asked for, so that its vocabulary is made up.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

_TOP = {
  "model.embed_tokens.weight": "token_embd.weight",
  "model.norm.weight": "output_norm.weight",
  "lm_head.weight": "output.weight",
}
_LAYER = {
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate": "ffn_gate_inp",
}
_SLOTS = 32768
"""More than a row is asked for: llama.cpp gives it no more than its file says it was trained on."""
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def write_gguf(folder: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the checkpoint in a folder, as `launch.convert --to_hf` makes it, to a file."""
  import gguf

  config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  writer = gguf.GGUFWriter(out, "qwen3moe")
  _write_keys(writer, config, gguf)
  for name, tensor in _tensors(folder, config):
    writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _write_keys(writer: Any, config: dict[str, Any], gguf: Any) -> None:
  writer.add_context_length(_SLOTS)
  writer.add_embedding_length(config["hidden_size"])
  writer.add_block_count(config["num_hidden_layers"])
  writer.add_feed_forward_length(config["intermediate_size"])
  writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
  writer.add_head_count(config["num_attention_heads"])
  writer.add_head_count_kv(config["num_key_value_heads"])
  writer.add_key_length(config["head_dim"])
  writer.add_value_length(config["head_dim"])
  writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
  writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
  writer.add_expert_count(config["num_experts"])
  writer.add_expert_used_count(config["num_experts_per_tok"])
  writer.add_file_type(gguf.LlamaFileType.ALL_F32)
  size = config["vocab_size"]
  words = [f"t{place}" for place in range(size)]
  writer.add_vocab_size(size)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("gpt-2")
  writer.add_token_list(words)
  writer.add_token_types([gguf.TokenType.NORMAL] * size)
  writer.add_token_merges(["t 0"])
  writer.add_add_bos_token(False)


def _tensors(folder: pathlib.Path, config: dict[str, Any]) -> Any:
  """Yields names and arrays; experts of a layer are stacked."""
  import numpy as np
  from safetensors.numpy import load_file

  read: dict[str, Any] = {}
  for path in sorted(folder.glob("*.safetensors")):
    read |= load_file(path)
  for name, other in _TOP.items():
    yield other, read[name]
  for layer in range(config["num_hidden_layers"]):
    ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
    for name, other in _LAYER.items():
      yield f"{theirs}{other}.weight", read[f"{ours}{name}.weight"]
    for name, other in _EXPERTS.items():
      experts = [
        read[f"{ours}mlp.experts.{expert}.{name}.weight"] for expert in range(config["num_experts"])
      ]
      yield f"{theirs}{other}.weight", np.stack(experts)
