"""Routers in float64 NumPy, from the papers: gates, scores, and a rule for each router.

A rule is `rule(config, seen) -> {"expert", "weight"[, "valid"]}`, token by token, in which `seen`
holds logits (T, E), scores (T, E), x (T, D), params by path, segment (B, L), ids (B, L) and
num_active. `clear` says for which tokens the choice is certain, so that indices can be compared.
"""

import types

import numpy as np

from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.gates import MLP, Linear

CLEAR = 1e-5


def softmax(logits):
  raised = np.exp(logits - logits.max(-1, keepdims=True))
  return raised / raised.sum(-1, keepdims=True)


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


SCORES = {
  "softmax": softmax,
  "sigmoid": lambda logits: 1 / (1 + np.exp(-logits)),
  "sqrt_softplus": lambda logits: np.sqrt(np.log1p(np.exp(logits))),
  "relu": lambda logits: np.maximum(logits, 0),
}


def linear_gate(config, x, params):
  """x W."""
  return x @ params["gate/weight"]


def mlp_gate(config, x, params):
  """act(x B) A."""
  act = {"gelu": gelu, "tanh": np.tanh}[config.activation]
  return act(x @ params["gate/up"]) @ params["gate/weight"]


def best(rank, num):
  """Returns the `num` best, lower expert first on ties, and for which tokens that is certain."""
  expert = np.argsort(-rank, axis=-1, kind="stable")[:, :num]
  ranked = np.sort(rank, axis=-1)[:, ::-1]
  return expert, np.all(-np.diff(ranked)[:, :num] > CLEAR, axis=-1)


def weigh(config, scores, expert):
  """Scores of the chosen, over their sum if the record says so, times its scale."""
  weight = np.take_along_axis(scores, expert, -1)
  if config.normalize:
    weight = weight / weight.sum(-1, keepdims=True)
  return weight * config.scale


def topk(config, seen):
  """The A best scores."""
  expert, clear = best(seen.scores, seen.num_active)
  return {"expert": expert, "weight": weigh(config, seen.scores, expert), "clear": clear}


GATES = {Linear: linear_gate, MLP: mlp_gate}
RULES = {TopK: topk}


def route(config, num_active, x, params, segment):
  """Returns the decision of a router over T = B * L tokens, with scores and log z."""
  logits = GATES[type(config.gate)](config.gate, x, params)
  scores = SCORES[config.score](logits)
  segment = np.asarray(segment)
  seen = types.SimpleNamespace(
    logits=logits, scores=scores, x=x, params=params, num_active=num_active, segment=segment,
    ids=np.broadcast_to(np.arange(segment.shape[1]), segment.shape),
  )
  peak = logits.max(-1)
  log_z = np.log(np.exp(logits - peak[:, None]).sum(-1)) + peak
  found = RULES[type(config)](config, seen)
  return {"valid": np.ones(found["expert"].shape, bool), "clear": np.ones(len(x), bool), **found,
          "scores": scores, "log_z": log_z}
