"""Losses of what choices tell: mutual information and load concentration (ModuleFormer).

Shen et al. 2023, sections 3.3 and 3.4, on the mean softmax p(m) over tokens and its entropies.
Neither adds up over microbatches: p(m) must be that of the scope.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.moe.balance.aux_loss import AuxLoss
from jaxmoe.moe.routing import RouterSums, entropy_of


@dataclasses.dataclass(frozen=True)
class _OfShares(AuxLoss):
  """A loss of mean scores that are shares."""

  weight: float = 1e-3

  def check(self, layer: Any) -> None:
    """Refuses scores that are no shares of 1."""
    if not layer.router.sum_to_1:
      raise InputError(
        f"{self.kind} is defined on a softmax: router.score={layer.router.score!r}; "
        "use score=softmax, or another balance loss"
      )


@dataclasses.dataclass(frozen=True)
class MutualInformation(_OfShares):
  """Minus the mutual information of token and expert, -H(m) + H(m|x), in nats (equation 5).

  It spreads tokens over experts and makes each token sure of its own: by itself it drives the
  scores of a token to one expert, so its weight stays small.
  """

  kind: ClassVar[str] = "mutual_information"

  def loss(self, sums: RouterSums, layer: Any) -> jax.Array:
    """Returns H(m|x) - H(m), between -log E and 0."""
    del layer
    tokens = jnp.maximum(sums.tokens, 1)
    return sums.entropy / tokens - entropy_of(sums.scores_E[None] / tokens)[0]


@dataclasses.dataclass(frozen=True)
class LoadConcentration(_OfShares):
  """H(m) in nats, to be minimised in finetuning so that few experts serve a task (equation 6)."""

  kind: ClassVar[str] = "load_concentration"

  def loss(self, sums: RouterSums, layer: Any) -> jax.Array:
    """Returns H(m), between 0 and log E."""
    del layer
    return entropy_of(sums.scores_E[None] / jnp.maximum(sums.tokens, 1))[0]
