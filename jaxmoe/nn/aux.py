"""The auxiliary losses of a layer of experts, and how it was used, beside its output."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.balance import StepTotals
from jaxmoe.moe.layer import MoESums
from jaxmoe.moe.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
  """What a layer of experts tells beside its output.

  Attributes:
    loss: float32, the auxiliary losses times their weights, summed; add it to the loss.
    load: float32 (E,), the share of choices that each expert got, before any drop.
    dropped: float32, the share of choices that were dropped.
    routing: Every token's experts and weights; T is all tokens, row after row.
    logits: What a gate that reads the logits of the layer before is given as `previous_logits`.
    sums: What routers' buffers are moved by, for `update_router`.
  """

  loss: jax.Array
  load: jax.Array
  dropped: jax.Array
  routing: Routing | None
  logits: Any
  sums: MoESums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelAux:
  """What several layers of experts tell beside the output of all.

  Attributes:
    loss: float32, the auxiliary losses of all layers; add it to the loss.
    layers: By the part's name: `moe` and `attention` of a block, `layers/3/moe` of a model.
  """

  loss: jax.Array
  layers: dict[str, Aux]


def aux_of(layer: Any, sums: MoESums, tokens: Tokens, logits: Any = None) -> Aux:
  """Returns what a layer tells.

  Args:
    layer: Its record.
    sums: Its sums over these tokens.
    tokens: All tokens of a step.
    logits: What its gate hands on.
  """
  rows = jnp.sum(jnp.any(tokens.valid, axis=1)).astype(jnp.float32)
  none = jax.tree.map(jnp.zeros_like, sums.router)
  totals = StepTotals(sums.router.tokens, rows, 1, 1, None, none)
  loss = jnp.zeros((), jnp.float32)
  for aux_loss in layer.balance:
    share = aux_loss.share(sums.router, sums.per_sequence, totals, layer)
    loss = loss + aux_loss.weight_of(sums.router) * share
  choices = jnp.maximum(jnp.sum(sums.router.counts_E), 1)
  dropped = sum(sums.dropped.values(), jnp.zeros((), jnp.float32)) / choices
  return Aux(loss, sums.router.counts_E / choices, dropped, sums.routing, logits, sums)


def joined(layers: dict[str, Aux]) -> ModelAux:
  """Returns what several layers tell together."""
  return ModelAux(sum((aux.loss for aux in layers.values()), jnp.zeros(())), layers)
