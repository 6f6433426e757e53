"""Routers: a gate with parameters, then a pure rule on its scores.

To add one, write its file (a record derived from `Router` with a `select`), add one line to
ROUTERS, and the contract test runs it. A name may also stand for settings of another's record.
"""

from jaxmoe.moe.routers.adaptive_coefficient import Adaptive, AdaptiveTopK, ReLU
from jaxmoe.moe.routers.assignment import Auction, Sinkhorn
from jaxmoe.moe.routers.bias import AuxFree, Quantile
from jaxmoe.moe.routers.dynamic import Threshold, TopP
from jaxmoe.moe.routers.expert_choice import CausalExpertChoice, ExpertChoice
from jaxmoe.moe.routers.forced import Balanced, Listed, Skewed
from jaxmoe.moe.routers.gates import GATES, CosineGateConfig, ResidualGateConfig
from jaxmoe.moe.routers.noise import Gumbel, Noisy
from jaxmoe.moe.routers.router import Router, RouterInputs, Selection
from jaxmoe.moe.routers.sparse_mixer import SparseMixer
from jaxmoe.moe.routers.token_hash import Hash
from jaxmoe.moe.routers.topk import GShard, Switch, TopK
from jaxmoe.moe.routers.tree import TreeGateConfig

ROUTERS = {
  "topk": (TopK, TopK()),
  "sigmoid": (TopK, TopK(score="sigmoid")),
  "sqrt_softplus": (TopK, TopK(score="sqrt_softplus")),
  "cosine": (TopK, TopK(gate=CosineGateConfig(width=8))),
  "residual": (TopK, TopK(gate=ResidualGateConfig())),
  "tree": (TopK, TopK(gate=TreeGateConfig())),
  "switch": (Switch, Switch(jitter=0.01)),
  "gshard": (GShard, GShard()),
  "noisy": (Noisy, Noisy()),
  "gumbel": (Gumbel, Gumbel()),
  "aux_free": (AuxFree, AuxFree()),
  "group_limited": (AuxFree, AuxFree(num_groups=2)),
  "quantile": (Quantile, Quantile()),
  "sinkhorn": (Sinkhorn, Sinkhorn(allow_future=True)),
  "base": (Auction, Auction(allow_future=True)),
  "hash": (Hash, Hash()),
  "expert_choice": (ExpertChoice, ExpertChoice(allow_future=True)),
  "causal_expert_choice": (CausalExpertChoice, CausalExpertChoice()),
  "balanced": (Balanced, Balanced()),
  "skewed": (Skewed, Skewed()),
  "given": (Listed, Listed(experts=(0, 2, 1, 3))),
  "top_p": (TopP, TopP()),
  "threshold": (Threshold, Threshold()),
  "sparse_mixer": (SparseMixer, SparseMixer()),
  "relu": (ReLU, ReLU()),
  "adaptive": (AdaptiveTopK, AdaptiveTopK()),
}

__all__ = ["GATES", "ROUTERS", "Adaptive", "Router", "RouterInputs", "Selection", "TopK", "top_k"]
