"""Rules that draw experts or decide how many there are, in float64 NumPy; see `routing.py`."""

import jax
import numpy as np

from jaxmoe.moe.routers.adaptive_coefficient import AdaptiveTopK, ReLU
from jaxmoe.moe.routers.dynamic import Threshold, TopP
from jaxmoe.moe.routers.sparse_mixer import SparseMixer
from jaxmoe.moe.routers.tree import TreeGateConfig

CLEAR = 1e-5


def ranked(scores, num):
  """Returns the `num` best of each token, lower expert first on ties, and which are certain."""
  expert = np.argsort(-scores, axis=-1, kind="stable")[:, :num]
  gaps = -np.diff(np.sort(scores, axis=-1)[:, ::-1])[:, :num]
  return expert, np.all(gaps > CLEAR, axis=-1)


def combine_weights(config, scores, expert, valid):
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
  return {"expert": expert, "weight": combine_weights(config, seen.scores, expert, valid), "valid":
  valid,
          "clear": clear}  # fmt: skip


def threshold(config, seen):
  """Every expert whose score is at least the threshold, at most A; the best anyway."""
  expert, clear = ranked(seen.scores, seen.num_active)
  valid = np.zeros(expert.shape, bool)
  for token, place in np.ndindex(expert.shape):
    score = seen.scores[token, expert[token, place]]
    valid[token, place] = place == 0 or score >= config.threshold
    clear[token] &= abs(score - config.threshold) > CLEAR
  return {"expert": expert, "weight": combine_weights(config, seen.scores, expert, valid), "valid":
  valid,
          "clear": clear}  # fmt: skip


def sparse_mixer(config, seen):
  """Twice, the second time without the first: mask what is far, softmax, draw; m or m / 3."""
  tokens, num_experts = seen.logits.shape
  expert, clear = np.zeros((tokens, 2), int), np.ones(tokens, bool)
  weight, estimated = np.zeros((tokens, 2)), np.zeros((tokens, 2))
  for place, name in enumerate(("first", "second")):
    if seen.keys is not None:
      keys = seen.keys / name
      gumbel = np.asarray(jax.random.gumbel(keys("draw"), seen.logits.shape), np.float64)
      uniform = np.asarray(jax.random.uniform(keys("heun"), (tokens,)))
    for token, row in enumerate(seen.logits):
      left = [e for e in range(num_experts) if place == 0 or e != expert[token, 0]]
      top = max(row[left])
      gap = {e: (top - row[e]) / max(abs(row[e]), top, 1e-30) - 2 * config.band for e in left}
      near = np.array([e for e in left if gap[e] <= 0])
      clear[token] &= all(abs(gap[e]) > CLEAR for e in left if row[e] < top)
      share = np.exp(row[near] - top) / np.exp(row[near] - top).sum()
      rank = row[near] + (0 if seen.keys is None else gumbel[token, near])
      at = np.argmax(rank)
      clear[token] &= np.sum(rank > rank[at] - CLEAR) == 1
      third = seen.keys is not None and row[near[at]] < top and uniform[token] <= 0.75
      expert[token, place], estimated[token, place] = near[at], share[at]
      weight[token, place] = share[at] / 3 if third else share[at]
  return {"expert": expert, "weight": weight * config.scale, "clear": clear,
          "estimated": estimated * config.scale}  # fmt: skip


def relu(config, seen):
  """What is above 0, at most A, with its score for a weight."""
  expert, _ = ranked(seen.scores, seen.num_active)
  score = np.take_along_axis(seen.scores, expert, -1)
  row = np.sort(seen.scores, axis=-1)[:, ::-1]
  apart = (-np.diff(row) > CLEAR) | (row[:, :-1] == 0)
  clear = apart[:, : seen.num_active].all(-1) & (np.abs(seen.logits) > CLEAR).all(-1)
  return {"expert": expert, "weight": combine_weights(config, seen.scores, expert, score > 0),
          "valid": score > 0, "adaptive_coefficient": steered(seen), "clear": clear}  # fmt: skip


def adaptive_top_k(config, seen):
  """The A best."""
  expert, clear = ranked(seen.scores, seen.num_active)
  weight = combine_weights(config, seen.scores, expert, np.ones(expert.shape, bool))
  return {"expert": expert, "weight": weight, "adaptive_coefficient": steered(seen), "clear": clear}


def steered(seen):
  return np.full(len(seen.logits), seen.params["buffers/pressure"][0])


def tree_gate(config, x, params):
  """log of the product, from the root to each leaf, of sigmoid(w x + b) or 1 less that."""
  weight, bias = params["gate/weight"], params["gate/bias"]
  num_leaves = weight.shape[1] + 1
  logits = np.zeros((len(x), num_leaves))
  for leaf in range(num_leaves):
    node, low, high = 0, 0, num_leaves
    while high - low > 1:
      left = 1 / (1 + np.exp(-(x @ weight[:, node] + bias[node])))
      middle, is_left = (low + high) // 2, leaf < (low + high) // 2
      logits[:, leaf] += np.log(left if is_left else 1 - left)
      node = 2 * node + (1 if is_left else 2)
      low, high = (low, middle) if is_left else (middle, high)
  return logits


GATES = {TreeGateConfig: tree_gate}
RULES = {
  TopP: top_p, Threshold: threshold, SparseMixer: sparse_mixer, ReLU: relu,
  AdaptiveTopK: adaptive_top_k,
}  # fmt: skip
