"""Rules that decide how many experts a token gets, in float64 NumPy; see `routing.py`."""

import numpy as np

from jaxmoe.moe.routers.dynamic import Threshold, TopP

CLEAR = 1e-5


def ranked(scores, num):
  """Returns the `num` best of each token, lower expert first on ties, and which are certain."""
  expert = np.argsort(-scores, axis=-1, kind="stable")[:, :num]
  gaps = -np.diff(np.sort(scores, axis=-1)[:, ::-1])[:, :num]
  return expert, np.all(gaps > CLEAR, axis=-1)


def weigh(config, scores, expert, valid):
  """Scores of the valid choices, over their sum if the record says so, times its scale."""
  weight = np.where(valid, np.take_along_axis(scores, expert, -1), 0)
  if config.normalize:
    weight = weight / np.maximum(weight.sum(-1, keepdims=True), 1e-20)
  return weight * config.scale


def top_p(config, seen):
  """t = argmin_k sum of the k largest shares >= p; the first t, at most A."""
  expert, clear = ranked(seen.scores, seen.num_active)
  valid = np.zeros(expert.shape, bool)
  for token, row in enumerate(seen.scores):
    total = 0.0
    for place, e in enumerate(expert[token]):
      valid[token, place] = True
      total += row[e] / row.sum()
      clear[token] &= abs(total - config.p) > CLEAR
      if total >= config.p:
        break
  return {"expert": expert, "weight": weigh(config, seen.scores, expert, valid), "valid": valid,
          "clear": clear}  # fmt: skip


def threshold(config, seen):
  """Every expert whose score is at least the threshold, at most A; the best anyway."""
  expert, clear = ranked(seen.scores, seen.num_active)
  valid = np.zeros(expert.shape, bool)
  for token, place in np.ndindex(expert.shape):
    score = seen.scores[token, expert[token, place]]
    valid[token, place] = place == 0 or score >= config.threshold
    clear[token] &= abs(score - config.threshold) > CLEAR
  return {"expert": expert, "weight": weigh(config, seen.scores, expert, valid), "valid": valid,
          "clear": clear}  # fmt: skip


RULES = {TopP: top_p, Threshold: threshold}
