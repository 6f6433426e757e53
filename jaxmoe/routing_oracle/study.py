"""The gap between routers and an oracle, by budget of FLOPs (Duo-LLM, Alizadeh et al. 2024).

The oracle looks at the token to be predicted: it bounds what routing could gain and is no model
that anybody could run. A minimum over many patterns is low by luck, too, so the same search is
made for a label of another text: what it gains there is what luck gains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.routing_oracle.last_token import LastToken
from jaxmoe.routing_oracle.methods import Tried, best_within, oracle_search

WARNING = (
  "The oracle looks at the token that is to be predicted: it is a bound, no model that can be run. "
  "It is the oracle of a single token, whose past stays as it was."
)


@dataclasses.dataclass(frozen=True)
class Case:
  """What is known of one token.

  Attributes:
    oracle: (budgets,) least loss.
    shuffled: (budgets,) least loss of a label of another text.
    random: (budgets,) mean loss of random patterns that fit, NaN where none does.
    best_of_random: (budgets,) the least of them.
    uniform: (K,) loss of one kind in all layers.
    shuffled_uniform: (K,) the same of the label of another text.
    router: Loss, FLOPs, and kinds (L,) of the model's own choices.
    at_router: Loss and kinds (L,) of the oracle at the FLOPs of the router's choices.
    recheck: Loss of the oracle's pattern at the largest budget, from a pass without a cache.
  """

  oracle: np.ndarray
  shuffled: np.ndarray
  random: np.ndarray
  best_of_random: np.ndarray
  uniform: np.ndarray
  shuffled_uniform: np.ndarray
  router: tuple[float, float, np.ndarray]
  at_router: tuple[float, np.ndarray]
  recheck: float


def study(
  last: LastToken,
  texts: Sequence[tuple[np.ndarray, int]],
  budgets: Sequence[float],
  method: Any,
  num_random: int = 100,
  seed: int = 0,
) -> dict[str, Any]:
  """Returns plain values: curves, agreement, difficulty and what luck gains.

  Args:
    last: Frozen weights and what may be chosen.
    texts: At least two (ids, next id).
    budgets: FLOPs, rising.
    method: Of `METHODS`.
    num_random: Random patterns a token.
    seed: Of them, and of whose label a token is given in place of its own.

  Raises:
    InputError: too few texts, or a router that takes what may not be chosen.
  """
  if len(texts) < 2:
    raise InputError("labels can only be shuffled among at least two tokens; take more")
  order = np.random.default_rng(seed).permutation(len(texts))
  other = dict(zip(order.tolist(), np.roll(order, 1).tolist()))
  cases = []
  for at, (ids, label) in enumerate(texts):
    labels = (label, texts[other[at]][1])
    cases.append(_case(last, ids, labels, (budgets, method, num_random, seed + at)))
  return _summary(last, cases, budgets)


def _case(
  last: LastToken, ids: np.ndarray, labels: tuple[int, int], how: tuple[Any, Any, int, int]
) -> Case:
  budgets, method, num_random, seed = how
  patterns, text = last.patterns, last.at(ids, labels)
  expert_L, router_losses = text.router()
  strange = sorted(set(expert_L.tolist()) - set(patterns.kinds))
  if strange:
    raise InputError(f"the router takes {strange}, not among kinds={list(patterns.kinds)}; add it")
  routed_L = np.array([patterns.kinds.index(expert) for expert in expert_L.tolist()])
  flops = float(patterns.flops(routed_L[None])[0])
  tried = Tried(text.losses)
  drawn = patterns.random(num_random, seed)
  layers, kinds = patterns.shape
  same_KL = np.repeat(np.arange(kinds)[:, None], layers, axis=1)
  random_P, drawn_P = tried(drawn), patterns.flops(drawn)
  uniform, shuffled_uniform = tried(same_KL), tried(same_KL, 1)
  tried(routed_L[None])
  found = oracle_search(tried, patterns, budgets, method)
  at_router = best_within(tried, patterns, [flops], 0)
  shuffled = oracle_search(tried, patterns, budgets, method, label=1)
  fits = [random_P[drawn_P <= budget] for budget in budgets]
  return Case(
    oracle=found.losses,
    shuffled=shuffled.losses,
    random=np.array([of.mean() if len(of) else np.nan for of in fits]),
    best_of_random=np.array([of.min() if len(of) else np.nan for of in fits]),
    uniform=uniform,
    shuffled_uniform=shuffled_uniform,
    router=(float(router_losses[0]), flops, routed_L),
    at_router=(float(at_router.losses[0]), at_router.patterns[0]),
    recheck=last.again(ids, labels[0], found.patterns[-1]),
  )


def _summary(last: LastToken, cases: list[Case], budgets: Sequence[float]) -> dict[str, Any]:
  patterns = last.patterns
  layers, kinds = patterns.shape
  agree_KK, same_L = np.zeros((kinds, kinds), int), np.zeros(layers)
  for case in cases:
    np.add.at(agree_KK, (case.router[2], case.at_router[1]), 1)
    same_L += case.router[2] == case.at_router[1]
  costs_K = patterns.flops_LK.sum(axis=0)
  small = min((k for k in range(kinds) if costs_K[k] > 0), key=lambda k: costs_K[k])
  mean = lambda name: _mean(np.stack([getattr(case, name) for case in cases]))  # noqa: E731
  gains = np.array([case.uniform[small] - case.oracle[-1] for case in cases])
  luck = np.array([case.shuffled_uniform[small] - case.shuffled[-1] for case in cases])
  names = [str(kind) for kind in patterns.kinds]
  return {
    "warning": WARNING,
    "tokens": len(cases),
    "depths": list(patterns.depths),
    "kinds": list(patterns.kinds),
    "flops_by_layer_and_kind": patterns.flops_LK.tolist(),
    "past": "the model's routers" if last.policy is None else f"expert {last.policy} everywhere",
    "budgets": [float(budget) for budget in budgets],
    "curves": {
      name: mean(name) for name in ("oracle", "best_of_random", "random", "shuffled")
    },
    "uniform": dict(zip(names, mean("uniform"))),
    "router": {
      "loss": float(np.mean([case.router[0] for case in cases])),
      "flops": float(np.mean([case.router[1] for case in cases])),
      "oracle_at_its_flops": float(np.mean([case.at_router[0] for case in cases])),
    },
    "agreement": {
      "router_by_oracle": agree_KK.tolist(), "by_layer": (same_L / len(cases)).tolist()
    },
    "difficulty": {
      "base": int(patterns.kinds[small]),
      "losses": [float(case.uniform[small]) for case in cases],
      "gains": gains.tolist(),
    },
    "selection": {
      "gain": float(gains.mean()),
      "gain_of_shuffled_labels": float(luck.mean()),
      "largest_change_without_cache": max(
        abs(case.recheck - float(case.oracle[-1])) for case in cases
      ),
    },
  }


def _mean(values_NB: np.ndarray) -> list[float | None]:
  """Returns means over tokens, None where some token has no value."""
  return [None if np.isnan(value) else float(value) for value in values_NB.mean(axis=0)]
