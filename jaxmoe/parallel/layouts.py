"""The Layout of a recipe's degrees: where parameters, gradients, moments and batches lie.

Experts lie over the expert axes; heads, hidden units and the vocabulary over `tensor` (Megatron's
column and row pairs); by its stage ZeRO (Rajbhandari et al. 2019) spreads moments (1), gradients
(2) and parameters (3) over `fsdp`, each leaf along its largest dim that is free and divides.
"""

from __future__ import annotations

from jax.sharding import Mesh

from jaxmoe.core.layout import EXPERT, Layout, Role, Rules
from jaxmoe.parallel.degrees import TOKEN_AXES, Parallel

TENSOR_DIMS = ("heads", "kv_heads", "mlp", "vocab")
UNEVEN = ("kv_heads", "vocab")
"""Dims that are kept whole and cut where they are used if they do not divide by `tensor`."""


def make_layout(parallel: Parallel, mesh: Mesh) -> Layout:
  """Returns the Layout of `parallel` over its mesh."""
  tensor = dict.fromkeys(TENSOR_DIMS, ("tensor",))
  weights: Rules = {**tensor, EXPERT: parallel.expert_axes}
  stages: dict[Role, int] = {"optimizer": 1, "grads": 1, "params": 3}
  stages = {role: stage for role, stage in stages.items() if parallel.zero >= stage}
  spread = dict.fromkeys(stages if parallel.fsdp > 1 else (), ("fsdp",))
  return Layout(
    mesh,
    rules={
      "params": weights,
      "grads": weights,
      "optimizer": weights,
      "activations": {"batch": TOKEN_AXES},
    },
    spread=spread,
    yielding=frozenset((*UNEVEN, EXPERT)),
  )
