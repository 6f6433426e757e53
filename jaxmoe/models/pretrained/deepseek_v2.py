"""DeepSeek-V2 (arXiv:2405.04434): latent attention, softmax scores, groups of experts."""

from __future__ import annotations

from typing import Any

from jaxmoe.models.pretrained import keys
from jaxmoe.models.pretrained.deepseek_v3 import (
  LATENT,
  SHARED_LEAVES,
  expert_sizes,
  first_dense,
  first_dense_keys,
  latent_attention,
  latent_attention_keys,
)
from jaxmoe.models.pretrained.family import Family, only_moe
from jaxmoe.models.pretrained.leaves import ENDS, EXPERTS, GATE, MLP, NORMS, leaf
from jaxmoe.models.pretrained.settings import Settings
from jaxmoe.models.transformer import Transformer
from jaxmoe.moe.balance import LoadBalance
from jaxmoe.moe.layer import MoE
from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.bias import AuxFree

GREEDY, GROUPS = "greedy", "group_limited_greedy"


def read(settings: Settings) -> Transformer:
  """Returns the record that a config.json describes."""
  settings.only("scoring_func", "softmax")
  settings.only("norm_topk_prob", False)  # transformers never normalises
  settings.only("mlp_bias", False)
  settings.only("topk_method", GREEDY, GROUPS)
  settings.skip("ep_size", "seq_aux", "num_nextn_predict_layers")
  groups = settings.get(int, "n_group", default=1), settings.get(int, "topk_group", default=1)
  scale = settings.get(float, "routed_scaling_factor", default=1.0)
  router: Any = TopK(normalize=False, scale=scale)
  if settings.get(str, "topk_method", default=GREEDY) == GROUPS:
    router = AuxFree(
      score="softmax", normalize=False, scale=scale, bias_rate=0.0, num_groups=groups[0],
      groups_active=groups[1], group_best=1,
    )  # fmt: skip
  alpha = settings.get(float, "aux_loss_alpha", default=0.001)
  balance = (LoadBalance(weight=alpha),) if alpha > 0 else ()
  moe = MoE(router=router, balance=balance, **expert_sizes(settings))
  attention = latent_attention(settings, neighbours=True)
  return keys.decoder(settings, first_dense(settings, attention, moe), eps=1e-6)


def write(model: Transformer) -> dict[str, Any]:
  """Returns the keys of config.json."""
  moe = only_moe(model)
  grouped = isinstance(moe.router, AuxFree)
  return {
    **keys.decoder_keys(model),
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


DEEPSEEK_V2 = Family(
  "DeepseekV2ForCausalLM",
  read,
  write,
  # The bias that other models are balanced by is zero.
  (*ENDS, *NORMS, *LATENT, *GATE, *EXPERTS, *MLP, *SHARED_LEAVES,
   leaf("moe/router/buffers/bias", "e")),
)  # fmt: skip
