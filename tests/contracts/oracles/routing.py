"""Routers in float64 NumPy, from the papers: gates, scores, and a rule for each router.

A rule is `rule(config, seen) -> {"expert", "weight"[, "valid"]}`, token by token, in which `seen`
holds logits (T, E), scores (T, E), x (T, D), params by path, segment (B, L), ids (B, L),
num_active and keys, from which noise is drawn (None in evaluation). `clear` says for which tokens
the choice is certain, so that indices can be compared.
"""

import math
import types

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import erf

from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.assignment import Auction, Sinkhorn
from jaxmoe.moe.routers.bias import AuxFree, Quantile
from jaxmoe.moe.routers.gates import (
  CosineGateConfig,
  LinearGateConfig,
  MLPGateConfig,
  ResidualGateConfig,
)
from jaxmoe.moe.routers.noise import Gumbel, Noisy
from jaxmoe.moe.routers.token_hash import Hash
from jaxmoe.moe.routers.topk import GShard, Switch
from tests.contracts.oracles import batch_routing, dynamic_routing

CLEAR = 1e-5


def softmax(logits):
  raised = np.exp(logits - logits.max(-1, keepdims=True))
  return raised / raised.sum(-1, keepdims=True)


def gelu(x):
  """x Phi(x)."""
  return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def gelu_by_tanh(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


SCORES = {
  "softmax": softmax,
  "sigmoid": lambda logits: 1 / (1 + np.exp(-logits)),
  "sqrt_softplus": lambda logits: np.sqrt(np.log1p(np.exp(logits))),
  "relu": lambda logits: np.maximum(logits, 0),
}


def linear_gate(config, x, params):
  """x W, and a bias where there is one."""
  return x @ params["gate/weight"] + (params["gate/bias"] if config.bias else 0)


def mlp_gate(config, x, params):
  """act(x B + b) A."""
  act = np.tanh if config.activation == "tanh" else gelu_by_tanh if config.approximate else gelu
  hidden = x @ params["gate/up"] + (params["gate/up_bias"] if config.bias else 0)
  return act(hidden) @ params["gate/weight"]


def top_k(rank, num):
  """Returns the `num` best, lower expert first on ties, and for which tokens that is certain."""
  expert = np.argsort(-rank, axis=-1, kind="stable")[:, :num]
  ranked = np.sort(rank, axis=-1)[:, ::-1]
  return expert, np.all(-np.diff(ranked)[:, :num] > CLEAR, axis=-1)


def combine_weights(config, scores, expert):
  """Scores of the chosen, over their sum if the record says so, times its scale."""
  weight = np.take_along_axis(scores, expert, -1)
  if config.normalize:
    weight = weight / weight.sum(-1, keepdims=True)
  return weight * config.scale


def topk(config, seen):
  """The A best scores."""
  expert, clear = top_k(seen.scores, seen.num_active)
  return {"expert": expert, "weight": combine_weights(config, seen.scores, expert), "clear": clear}


def cosine_gate(config, x, params):
  """(x P) . e / (|x P| |e| temperature), the temperature at least `least`."""
  low, experts = x @ params["gate/down"], params["gate/weight"]
  cosine = low @ experts / np.linalg.norm(low, axis=1)[:, None] / np.linalg.norm(experts, axis=0)
  return cosine / np.maximum(np.exp(-params["gate/sharpness"]), config.least)


def noise_of(draw, name, shape, seen):
  return np.asarray(getattr(jax.random, draw)(seen.keys(name), shape), np.float64)


def gshard(config, seen):
  """Algorithm 1: the second expert where 2 g2 exceeds a uniform number."""
  found = topk(config, seen)
  if seen.keys is None:
    return found
  top = np.sort(seen.scores, axis=1)[:, ::-1]
  share = top[:, 1] / (top[:, 0] + top[:, 1])
  kept = 2 * share > noise_of("uniform", "second", share.shape, seen)
  return {**found, "valid": np.stack([np.ones_like(kept), kept], axis=1)}


def noisy(config, seen):
  """H = x W + N softplus(x W_noise); P(x, i) = Phi((x W - kth_excluding(H, k, i)) / softplus)."""
  if seen.keys is None:
    return topk(config, seen)
  deviation = np.log1p(np.exp(seen.x @ seen.params["rule/noise"]))
  noisy = seen.logits + noise_of("normal", "noise", deviation.shape, seen) * deviation
  expert, clear = top_k(noisy, seen.num_active)
  load = np.ones_like(noisy)
  for token, i in np.ndindex(noisy.shape):
    others = sorted(np.delete(noisy[token], i), reverse=True)
    if seen.num_active <= len(others):
      above = seen.logits[token, i] - others[seen.num_active - 1]
      load[token, i] = 0.5 * (1 + math.erf(above / deviation[token, i] / np.sqrt(2)))
  weight = combine_weights(config, SCORES[config.score](noisy), expert)
  return {"expert": expert, "weight": weight, "clear": clear, "load": load}


def gumbel(config, seen):
  """Experts by logits + Gumbel noise, weights by clean scores."""
  if seen.keys is None:
    return topk(config, seen)
  noise = noise_of("gumbel", "noise", seen.logits.shape, seen)
  expert, clear = top_k(seen.logits + noise, seen.num_active)
  return {"expert": expert, "weight": combine_weights(config, seen.scores, expert), "clear": clear}


def aux_free(config, seen):
  """Of the groups with the largest sums of their best biased scores, the best biased scores."""
  biased = seen.scores + seen.params["buffers/bias"]
  size, allowed = biased.shape[1] // config.num_groups, np.ones(biased.shape, bool)
  clear = np.ones(len(biased), bool)
  if config.num_groups > 1:
    for token, row in enumerate(biased):
      groups = np.split(row, config.num_groups)
      merit = np.array([np.sort(group)[::-1][: config.group_best].sum() for group in groups])
      active, clear[token] = (part[0] for part in top_k(merit[None], config.groups_active))
      allowed[token] = np.isin(np.arange(len(row)) // size, active)
  expert, sure = top_k(np.where(allowed, biased, -1e9), seen.num_active)
  weight = combine_weights(config, seen.scores, expert)
  return {"expert": expert, "weight": weight, "clear": clear & sure}


def quantile(config, seen):
  """The best of logits - beta; margins over the one that just failed."""
  biased = seen.logits - seen.params["buffers/beta"]
  expert, clear = top_k(biased, seen.num_active)
  ranked = np.sort(biased, axis=1)[:, ::-1]
  alpha = ranked[:, min(seen.num_active, ranked.shape[1] - 1)]
  weight, margins = combine_weights(config, seen.scores, expert), seen.logits - alpha[:, None]
  return {"expert": expert, "weight": weight, "clear": clear, "margins": margins}


def sinkhorn(config, seen):
  """Megatron's loop: d0 and d1 in turn, over valid tokens, until nothing moves."""
  rank, valid = seen.scores, seen.segment.reshape(-1) > 0
  if seen.keys is not None and valid.any():
    cost = np.exp(seen.logits[valid])
    d1, moved = np.ones(cost.shape[1]), 1.0
    while moved > 1e-13:
      d0 = 1 / len(cost) / (cost @ d1)
      new = 1 / len(d1) / (d0 @ cost)
      d1, moved = new, np.abs(new - d1).mean() / new.mean()
    plan = d0[:, None] * cost * d1
    np.testing.assert_allclose(plan.sum(1), 1 / len(cost), rtol=1e-9)
    rank = np.zeros_like(seen.logits)
    rank[valid] = np.log(plan)
  expert = np.argsort(-rank, axis=1, kind="stable")[:, : seen.num_active]
  ranked = np.sort(rank, axis=1)[:, ::-1]
  clear = np.all(-np.diff(ranked)[:, : seen.num_active] > 1e-3, axis=1)
  return {
    "expert": expert,
    "weight": combine_weights(config, seen.scores, expert),
    "clear": clear | ~valid,
  }


def places(logits, valid):
  """How many tokens each expert gets: the most wanted ones one more."""
  each, more = divmod(valid.sum(), logits.shape[1])
  wanted = np.argsort(-softmax(logits)[valid].sum(0), kind="stable")
  return each + np.isin(np.arange(logits.shape[1]), wanted[:more])


def auction(config, seen):
  """The assignment of the largest sum, solved exactly with an object for every place."""
  valid = seen.segment.reshape(-1) > 0
  expert = np.argmax(seen.logits, axis=1)
  if seen.keys is not None:
    owner = np.repeat(np.arange(seen.logits.shape[1]), places(seen.logits, valid))
    rows, columns = linear_sum_assignment(-seen.logits[valid][:, owner])
    expert[np.flatnonzero(valid)[rows]] = owner[columns]
  return {
    "expert": expert[:, None],
    "weight": combine_weights(config, seen.scores, expert[:, None]),
  }


def hashed(config, seen):
  """The experts whose hash (MurmurHash3's finalizer, in Python's integers) is largest."""

  def mix(number):
    number = (number ^ number >> 16) * 0x85EBCA6B % 2**32
    number = (number ^ number >> 13) * 0xC2B2AE35 % 2**32
    return number ^ number >> 16

  num_experts, rows = seen.logits.shape[1], []
  for token in seen.ids.reshape(-1).tolist():
    drawn = [mix((mix(token ^ mix(config.seed)) + e) % 2**32) for e in range(num_experts)]
    rows.append(sorted(range(num_experts), key=lambda e: -drawn[e])[: seen.num_active])
  expert = np.array(rows)
  of = seen.scores if config.by_score else np.ones_like(seen.scores)
  return {"expert": expert, "weight": combine_weights(config, of, expert)}


def residual_gate(config, x, params):
  """The first of a stack has no residual."""
  inner = {name.replace("gate/inner/", "gate/"): leaf for name, leaf in params.items()}
  return GATES[type(config.inner)](config.inner, x, inner)


GATES = {
  LinearGateConfig: linear_gate, MLPGateConfig: mlp_gate, CosineGateConfig: cosine_gate,
  ResidualGateConfig: residual_gate,
  **dynamic_routing.GATES,
}  # fmt: skip
RULES = {
  TopK: topk, Switch: topk, GShard: gshard, Noisy: noisy, Gumbel: gumbel, AuxFree: aux_free,
  Quantile: quantile, Sinkhorn: sinkhorn, Auction: auction, Hash: hashed,
  **dynamic_routing.RULES,
  **batch_routing.RULES,
}  # fmt: skip


def route(config, num_active, x, params, segment, keys=None):
  """Returns the decision of a router over T = B * L tokens, with scores and log z."""
  seen_by_gate = x
  if keys is not None and getattr(config, "jitter", 0):
    drawn = jax.random.uniform(keys("jitter"), x.shape, minval=-1, maxval=1)
    seen_by_gate = x * (1 + config.jitter * np.asarray(drawn, np.float64))
  logits = GATES[type(config.gate)](config.gate, seen_by_gate, params)
  scores = SCORES[config.score](logits)
  segment = np.asarray(segment)
  seen = types.SimpleNamespace(
    logits=logits,
    scores=scores,
    x=x,
    params=params,
    num_active=num_active,
    segment=segment,
    ids=np.broadcast_to(np.arange(segment.shape[1]), segment.shape),
    keys=keys,
  )
  peak = logits.max(-1)
  log_z = np.log(np.exp(logits - peak[:, None]).sum(-1)) + peak
  found = RULES[type(config)](config, seen)
  return {
    "valid": np.ones(found["expert"].shape, bool),
    "clear": np.ones(len(x), bool),
    **found,
    "scores": scores,
    "log_z": log_z,
  }
