"""DeepSeek-V3 (arXiv:2412.19437): latent attention, sigmoid scores, groups, balance by a bias.

Layers that predict further tokens lie behind the last one and are left aside, as transformers does.
"""

from __future__ import annotations

from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.block import MLPConfig as DenseMLP
from jaxmoe.models.latent_attention import LatentAttention
from jaxmoe.models.pretrained import config_keys
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.model_family import (
  FREQUENCIES,
  ModelFamily,
  blocks,
  only_mlp,
  only_moe,
)
from jaxmoe.models.pretrained.rope_config import read_rope, rope_keys
from jaxmoe.models.pretrained.shared_mappings import AT, ENDS, EXPERTS, GATE, MLP, NORMS, mapping
from jaxmoe.models.pretrained.tensor_mapping import GATE_UP, ParamMapping, TensorLayout
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers.bias import AuxFree

SHARED, SELF = AT + "mlp.shared_experts.", AT + "self_attn."
LATENT = (
  ParamMapping(
    "attention/q",
    "c n h",
    (
      TensorLayout(SELF + "q_b_proj.weight", "(n h) c", needs="attention/q_down"),
      TensorLayout(SELF + "q_proj.weight", "(n h) c"),
    ),
  ),
  mapping("attention/q_down", "d c", (SELF + "q_a_proj.weight", "c d")),
  mapping("attention/q_norm/scale", "c", (SELF + "q_a_layernorm.weight", "c")),
  mapping("attention/down", "d c", (SELF + "kv_a_proj_with_mqa.weight", "c+r d")),
  mapping("attention/k_rope", "d r", (SELF + "kv_a_proj_with_mqa.weight", "c+r d")),
  mapping("attention/norm/scale", "c", (SELF + "kv_a_layernorm.weight", "c")),
  mapping("attention/k", "c n h", (SELF + "kv_b_proj.weight", "(n h+v) c")),
  mapping("attention/v", "c n v", (SELF + "kv_b_proj.weight", "(n h+v) c")),
  mapping("attention/o", "n v d", (SELF + "o_proj.weight", "d (n v)")),
)
SHARED_LEAVES = (
  ParamMapping(
    "moe/shared/gate_up", "d g f", (TensorLayout(SHARED + "{g}_proj.weight", "f d", GATE_UP),)
  ),
  mapping("moe/shared/down", "f d", (SHARED + "down_proj.weight", "d f")),
)


def latent_attention(config: ConfigReader, neighbours: bool) -> LatentAttention:
  """Returns the attention of a layer."""
  config.only("attention_bias", False)
  config.skip("head_dim", "qk_head_dim", "num_key_value_heads")
  theta, scaling = read_rope(config, 10_000.0)
  return LatentAttention(
    num_heads=config.get(int, "num_attention_heads"),
    head_dim=config.get(int, "qk_nope_head_dim"),
    rope_dim=config.get(int, "qk_rope_head_dim"),
    value_dim=config.get(int, "v_head_dim"),
    latent_dim=config.get(int, "kv_lora_rank"),
    query_dim=config.get(int, "q_lora_rank", default=None),
    rope_theta=theta,
    rope=scaling,
    neighbours=neighbours,
  )


def latent_attention_keys(model: TransformerConfig) -> dict[str, Any]:
  """Returns the inverse of `latent_attention`."""
  of = blocks(model)[0].attention
  return {
    "attention_bias": False,
    "kv_lora_rank": of.latent_dim,
    "num_attention_heads": of.num_heads,
    "num_key_value_heads": of.num_heads,
    "q_lora_rank": of.query_dim,
    "qk_nope_head_dim": of.head_dim,
    "qk_rope_head_dim": of.rope_dim,
    "v_head_dim": of.value_dim,
    **rope_keys(of.rope_theta, of.rope),
  }


def first_dense(config: ConfigReader, attention: Any, moe: MoEConfig) -> list[BlockConfig]:
  """Returns the blocks: the first ones dense, the rest with experts."""
  config.only("moe_layer_freq", 1)
  dense = config.get(int, "first_k_dense_replace", default=0)
  mlp = DenseMLP(config.get(int, "intermediate_size"))
  depths = range(config_keys.num_layers(config))
  return [BlockConfig(attention, mlp if depth < dense else moe) for depth in depths]


def first_dense_keys(model: TransformerConfig, moe: MoEConfig) -> dict[str, Any]:
  """Returns the inverse of `first_dense`, and of `expert_sizes`."""
  mlp, width = only_mlp(model), moe.experts.mlp_dim
  return {
    "first_k_dense_replace": next(
      depth for depth, ffn in enumerate(model.ffns) if isinstance(ffn, MoEConfig)
    ),
    "intermediate_size": mlp.mlp_dim if mlp else width,
    "moe_intermediate_size": width,
    "moe_layer_freq": 1,
    "n_routed_experts": moe.num_experts,
    "n_shared_experts": moe.shared_mlp_dim // width,
    "num_experts_per_tok": moe.num_active,
    "routed_scaling_factor": moe.router.scale,
  }


def expert_sizes(config: ConfigReader) -> dict[str, Any]:
  """Returns the fields of a layer of experts that say how many there are, and how wide."""
  width = config.get(int, "moe_intermediate_size")
  shared = config.get(int, "n_shared_experts", default=1)
  if shared < 1:
    raise InputError(f"{config.where}: n_shared_experts={shared} must be at least 1")
  return {
    "num_experts": config.get(int, "n_routed_experts", "num_local_experts", "num_experts"),
    "num_active": config.get(int, "num_experts_per_tok"),
    "experts": SwiGLU(mlp_dim=width),
    "shared_mlp_dim": width * shared,
  }


def read(config: ConfigReader) -> TransformerConfig:
  """Returns the record that a config.json describes."""
  config.only("scoring_func", "sigmoid")
  config.only("topk_method", "noaux_tc")
  config.skip("aux_loss_alpha", "ep_size", "seq_aux")
  config.skip("num_mtp_layers", "num_nextn_predict_layers")
  router = AuxFree(
    normalize=config.get(bool, "norm_topk_prob", default=True),
    scale=config.get(float, "routed_scaling_factor", default=2.5),
    num_groups=config.get(int, "n_group", default=1),
    groups_active=config.get(int, "topk_group", default=1),
  )
  moe = MoEConfig(router=router, balance=(), **expert_sizes(config))
  attention = latent_attention(config, config.get(bool, "rope_interleave", default=True))
  return config_keys.decoder(config, first_dense(config, attention, moe), eps=1e-6)


def write(model: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe = only_moe(model)
  return {
    **config_keys.decoder_keys(model),
    **latent_attention_keys(model),
    **first_dense_keys(model, moe),
    "n_group": moe.router.num_groups,
    "norm_topk_prob": moe.router.normalize,
    "num_nextn_predict_layers": 0,
    "rope_interleave": blocks(model)[0].attention.neighbours,
    "scoring_func": "sigmoid",
    "topk_group": moe.router.groups_active,
    "topk_method": "noaux_tc",
  }


DEEPSEEK_V3 = ModelFamily(
  "DeepseekV3ForCausalLM",
  read,
  write,
  (
    *ENDS, *NORMS, *LATENT, *GATE, *EXPERTS, *MLP, *SHARED_LEAVES,
    mapping("moe/router/buffers/bias", "e", (AT + "mlp.gate.e_score_correction_bias", "e")),
  ),
  (FREQUENCIES, r"model\.layers\.61\..*"),
)  # fmt: skip
