"""Rules by which experts choose tokens, and rules by place, in float64 NumPy; see `routing.py`.

`estimated` stands for the weight where gradients are those of other weights (straight through).
"""

import math
from fractions import Fraction

import numpy as np

from jaxmoe.moe.routers.expert_choice import CausalExpertChoice, ExpertChoice
from jaxmoe.moe.routers.forced import Balanced, Listed, Skewed
from tests.contracts.oracles.dynamic_routing import CLEAR, combine_weights, ranked


def by_token(config, seen, taken):
  """The experts that took a token, best first, at most `most`; then the others by id."""
  num_experts, width = taken.shape[1], config.most or taken.shape[1]
  expert, clear = np.zeros((len(taken), width), int), np.ones(len(taken), bool)
  valid = np.zeros(expert.shape, bool)
  for token, row in enumerate(seen.scores):
    mine = sorted(np.flatnonzero(taken[token]), key=lambda e: -row[e])
    clear[token] = np.all(-np.diff(row[mine]) > CLEAR)
    expert[token] = [*mine, *(e for e in range(num_experts) if e not in mine)][:width]
    valid[token, : len(mine)] = True
  weight = combine_weights(config, seen.scores, expert, valid)
  return {"expert": expert, "weight": weight, "valid": valid, "clear": clear}


def best_of_token(config, seen):
  """The best c experts of each token, c the mean number of experts."""
  expert, clear = ranked(seen.scores, round(Fraction(str(config.factor)) * seen.num_active))
  return expert, clear


def expert_choice(config, seen):
  """G, I = TopK(S^T, k), k = n c / e, over valid tokens."""
  if seen.keys is None and not config.always:
    expert, clear = best_of_token(config, seen)
    valid = np.ones(expert.shape, bool)
    return {
      "expert": expert,
      "weight": combine_weights(config, seen.scores, expert, valid),
      "clear": clear,
    }
  tokens = np.flatnonzero(seen.segment.reshape(-1) > 0)
  num_experts = seen.scores.shape[1]
  k = math.ceil(len(tokens) * Fraction(str(config.factor)) * seen.num_active / num_experts)
  taken = np.zeros(seen.scores.shape, bool)
  clear = True
  for e in range(num_experts):
    order = sorted(tokens, key=lambda token: -seen.scores[token, e])
    taken[order[:k], e] = True
    if k < len(order):
      clear &= seen.scores[order[k - 1], e] - seen.scores[order[k], e] > CLEAR
  found = by_token(config, seen, taken)
  return {**found, "clear": found["clear"] & clear}


def causal_expert_choice(config, seen):
  """The scores above the experts' thresholds; without any, the best of each token."""
  threshold = seen.params["buffers/threshold"]
  taken = seen.scores > threshold
  clear = np.all(np.abs(seen.scores - threshold) > CLEAR, axis=1)
  if not threshold.any():
    expert, clear = best_of_token(config, seen)
    taken = np.zeros(seen.scores.shape, bool)
    np.put_along_axis(taken, expert, True, axis=1)
  found = by_token(config, seen, taken)
  return {**found, "clear": found["clear"] & clear, "margins": seen.scores}


def by_place(config, seen, experts_of):
  """Experts by a function of the place in the batch; even weights, whose slope is the scores'."""
  expert = np.array([experts_of(place) for place in range(seen.segment.size)])
  share = lambda scores: combine_weights(config, scores, expert, np.ones(expert.shape, bool))  # noqa: E731
  even, slope = share(np.ones_like(seen.scores)), share(seen.scores)
  return {"expert": expert, "weight": even, "estimated": slope}


def balanced(config, seen):
  """Place after place, expert after expert."""
  num_experts, active = seen.scores.shape[1], seen.num_active
  return by_place(config, seen, lambda n: [(n * active + a) % num_experts for a in range(active)])


def inclusion(exponent, num_experts, active):
  """How often a token has each expert: c / (e + 1)^s but at most 1, c by bisection."""
  law = np.array([(e + 1.0) ** -exponent for e in range(num_experts)])
  low, high = 0.0, 1 / law.min()
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if np.minimum(1, middle * law).sum() < active else (low, middle)
  return np.minimum(1, high * law)


def skewed(config, seen):
  """Systematic sampling from a start at n times the golden ratio, in 2^-16 of an expert."""
  ends, total = [], 0.0
  for share in inclusion(config.exponent, seen.scores.shape[1], seen.num_active):
    total += share
    ends.append(round(total * 2**16))

  def experts_of(place):
    start = place * 2654435769 % 2**32 // 2**16
    points = [start + 2**16 * a for a in range(seen.num_active)]
    return [next(e for e, end in enumerate(ends) if point < end) for point in points]

  return by_place(config, seen, experts_of)


def given(config, seen):
  """The list, over and over."""
  active, ids = seen.num_active, config.experts
  return by_place(config, seen, lambda n: [ids[(n * active + a) % len(ids)] for a in range(active)])


RULES = {
  ExpertChoice: expert_choice, CausalExpertChoice: causal_expert_choice, Balanced: balanced,
  Skewed: skewed, Listed: given,
}  # fmt: skip
