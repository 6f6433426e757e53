"""Which choices get a row, and of which expert: loops over queues, from the papers.

`fate(dispatch, decision, chance)` takes a router's decision as a dict of NumPy arrays (`expert`,
`weight`, `valid` of (T, A), `scores` (T, E)), with `active` choices a token in the mean if not A,
and returns a dict: `expert` (T, A) that computes the choice, `has_row` (T, A), and `ratio` (T, A),
what its weight is multiplied by.
"""

import math
from fractions import Fraction

import numpy as np

from jaxmoe.moe.dispatch.capacity import Limited


def rows_of_an_expert(dispatch, tokens, active, experts, idle=0):
  """C = factor * tau * T * A / (tau * N + N_idle), rounded up, between 1 and T, of decimals."""
  settings = dispatch.factor, dispatch.idle_share, active
  factor, tau, active = (Fraction(str(setting)) for setting in settings)
  mean = tau * tokens * active / (tau * experts + idle)
  return min(tokens, max(1, math.ceil(factor * mean)))


def rank(overflow, decision, chance):
  """In which order choices (T, A) ask for a place, lowest first; equal ones in order of tokens."""
  if overflow == "score":
    return -decision["weight"]
  return chance if overflow == "random" else np.zeros_like(decision["weight"])


def fate(dispatch, decision, chance=None):
  expert, scores = decision["expert"].copy(), decision["scores"]
  tokens, active = expert.shape
  room = np.full(scores.shape[1], tokens * active)
  overflow = getattr(dispatch, "overflow", "position")
  if isinstance(dispatch, Limited):
    mean = decision.get("active", active)
    room[:] = rows_of_an_expert(dispatch, tokens, mean, scores.shape[1])
  has_row, ratio = np.zeros(expert.shape, bool), np.ones(expert.shape)
  order = np.argsort(rank(overflow, decision, chance).ravel(), kind="stable")
  for token, choice in zip(*np.unravel_index(order, expert.shape)):
    if not decision["valid"][token, choice]:
      continue
    wanted = found = expert[token, choice]
    if overflow == "spill" and not room[wanted]:
      others = {expert[token, i] for i in range(active) if decision["valid"][token, i]} - {wanted}
      left = [e for e in range(len(room)) if room[e] and e not in others]
      found = max(left, key=lambda e: scores[token, e], default=wanted)
      if found != wanted and scores[token, wanted] > 0:
        ratio[token, choice] = min(1, scores[token, found] / scores[token, wanted])
    has_row[token, choice] = room[found] > 0
    room[found] -= has_row[token, choice]
    expert[token, choice] = found
  return {"expert": expert, "has_row": has_row, "ratio": ratio}
