"""Routing patterns: for one token a kind of expert in every MoE layer, and what that costs.

A pattern is a row of L indices into `kinds`, one a MoE layer in order of depth. Its cost is the
FLOPs of the experts alone (two a parameter): attention, gates, shared experts and the head are the
same for all patterns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.layer import MoEConfig

SKIP = -1
"""The kind that is no expert at all: the stream passes the layer by."""


@dataclasses.dataclass(frozen=True)
class Patterns:
  """What may be chosen.

  Attributes:
    depths: Of the MoE layers.
    num_layers: Of all blocks.
    kinds: Expert ids, and perhaps SKIP.
    flops_LK: What each kind costs in each layer.
  """

  depths: tuple[int, ...]
  num_layers: int
  kinds: tuple[int, ...]
  flops_LK: np.ndarray

  @classmethod
  def of(cls, model: TransformerConfig, kinds: tuple[int, ...] = ()) -> Patterns:
    """Returns the patterns of a model.

    Args:
      model: The record; each MoE layer sends a token to one expert.
      kinds: Expert ids and SKIP; none for all open experts, and SKIP if none of them is free.

    Raises:
      InputError: no MoE layer, one that sends a token to several, or a kind that is not there.
    """
    layers = {depth: ffn for depth, ffn in enumerate(model.ffns) if isinstance(ffn, MoEConfig)}
    if not layers:
      raise InputError("the model has no MoE layer, so there is no pattern to choose")
    if {layer.num_active for layer in layers.values()} != {1}:
      raise InputError(
        "an oracle chooses one expert a layer, and the model sends a token to several: "
        f"num_active={sorted({layer.num_active for layer in layers.values()})}; train one with "
        "num_active=1, such as --config=configs/tiny.py:experts=duo,router=switch"
      )
    costs = [of.experts.expert_params(model.dim, of.num_experts) for of in layers.values()]
    fewest = min(layer.num_routable for layer in layers.values())
    if not kinds:
      free = min(min(of[:fewest]) for of in costs) == 0
      kinds = (*range(fewest), *(() if free else (SKIP,)))
    if len(set(kinds)) != len(kinds) or not all(SKIP <= kind < fewest for kind in kinds):
      raise InputError(
        f"kinds must be distinct experts below {fewest}, or {SKIP} for none: kinds={list(kinds)}"
      )
    flops = [[0.0 if kind == SKIP else 2.0 * of[kind] for kind in kinds] for of in costs]
    return cls(tuple(layers), model.num_layers, kinds, np.array(flops))

  @property
  def shape(self) -> tuple[int, int]:
    """(L, K): layers and kinds."""
    return self.flops_LK.shape  # type: ignore[return-value]

  def flops(self, patterns_PL: np.ndarray) -> np.ndarray:
    """Returns (P,) what each pattern costs."""
    return self.flops_LK[np.arange(self.shape[0])[None], patterns_PL].sum(axis=1)

  def check(self, budgets: Sequence[float]) -> None:
    """Raises InputError unless every budget pays for the cheapest pattern."""
    least = float(self.flops(self.cheapest()[None])[0])
    if not len(budgets) or not min(budgets) >= least:
      raise InputError(f"every budget must be at least {least:g} FLOPs: budgets={list(budgets)}")

  def all(self) -> np.ndarray:
    """Returns all K^L patterns."""
    layers, kinds = self.shape
    return np.stack(np.unravel_index(np.arange(kinds**layers), (kinds,) * layers), axis=1)

  def cheapest(self) -> np.ndarray:
    """Returns (L,) the pattern that costs least."""
    return self.flops_LK.argmin(axis=1)

  def random(self, num: int, seed: int) -> np.ndarray:
    """Returns (num, L) draws, each from shares of kinds of its own, so that all costs occur."""
    rng = np.random.default_rng(seed)
    layers, kinds = self.shape
    shares_PK = rng.dirichlet(np.ones(kinds), num)
    below_PL = rng.random((num, layers))[:, :, None] > shares_PK.cumsum(axis=1)[:, None]
    return np.minimum(below_PL.sum(axis=2), kinds - 1)

  def replayed_experts(self, patterns_PL: np.ndarray) -> np.ndarray:
    """Returns int32 (all blocks, P, 1, 1) as `Tokens.replayed_experts` wants it, P rows of a
    token."""
    replayed_experts = np.full((self.num_layers, len(patterns_PL), 1, 1), SKIP, np.int32)
    replayed_experts[list(self.depths), :, 0, 0] = np.asarray(self.kinds, np.int32)[patterns_PL].T
    return replayed_experts
