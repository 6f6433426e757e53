"""DeepSeek-V2 (arXiv:2405.04434): latent attention, softmax scores, groups of experts."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.pretrained import config_keys
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.deepseek_v3 import (
  LATENT,
  SHARED_LEAVES,
  expert_sizes,
  first_dense,
  first_dense_keys,
  latent_attention,
  latent_attention_keys,
)
from jaxmoe.models.pretrained.model_family import ModelFamily, only_moe
from jaxmoe.models.pretrained.shared_mappings import ENDS, EXPERTS, GATE, MLP, NORMS, mapping
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.balance import LoadBalance
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.bias import AuxFree

GREEDY, GROUPS = "greedy", "group_limited_greedy"


def read(config: ConfigReader) -> TransformerConfig:
  """Returns the record that a config.json describes."""
  config.only("scoring_func", "softmax")
  config.only("norm_topk_prob", False)  # transformers never normalises
  config.only("mlp_bias", False)
  config.only("topk_method", GREEDY, GROUPS)
  config.skip("ep_size", "seq_aux", "num_nextn_predict_layers")
  groups = config.get(int, "n_group", default=1), config.get(int, "topk_group", default=1)
  scale = config.get(float, "routed_scaling_factor", default=1.0)
  router: Any = TopK(normalize=False, scale=scale)
  if config.get(str, "topk_method", default=GREEDY) == GROUPS:
    router = AuxFree(
      score="softmax", normalize=False, scale=scale, bias_rate=0.0, num_groups=groups[0],
      groups_active=groups[1], group_best=1,
    )  # fmt: skip
  alpha = config.get(float, "aux_loss_alpha", default=0.001)
  balance = (LoadBalance(weight=alpha),) if alpha > 0 else ()
  moe = MoEConfig(router=router, balance=balance, **expert_sizes(config))
  attention = latent_attention(config, neighbours=True)
  return config_keys.decoder(config, first_dense(config, attention, moe), eps=1e-6)


def write(model: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe = only_moe(model)
  grouped = isinstance(moe.router, AuxFree)
  return {
    **config_keys.decoder_keys(model),
    **latent_attention_keys(model),
    **first_dense_keys(model, moe),
    "aux_loss_alpha": sum(term.weight for term in moe.balance if isinstance(term, LoadBalance)),
    "mlp_bias": False,
    "n_group": moe.router.num_groups if grouped else None,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_group": moe.router.groups_active if grouped else None,
    "topk_method": GROUPS if grouped else GREEDY,
  }


DEEPSEEK_V2 = ModelFamily(
  "DeepseekV2ForCausalLM",
  read,
  write,
  # The bias that other models are balanced by is zero.
  (*ENDS, *NORMS, *LATENT, *GATE, *EXPERTS, *MLP, *SHARED_LEAVES,
   mapping("moe/router/buffers/bias", "e")),
)  # fmt: skip
