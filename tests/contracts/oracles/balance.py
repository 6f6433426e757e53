"""Balance losses in float64 NumPy: what a loss is over a set of tokens, and which sets there are.

A loss is `loss(config, layer, seen)` over tokens in any order. In `of_router` a router's noise is
stood for by a load of softmax(2 logits).
"""

import dataclasses

import numpy as np

from jaxmoe.moe.balance import (
  Heterogeneous,
  LatencyAware,
  LoadBalance,
  LoadConcentration,
  MutualInformation,
  NullAveraged,
  RouterZ,
  Sparsity,
)


@dataclasses.dataclass(frozen=True)
class RouterInputs:
  """What a router did with some tokens: scores (..., E), log z (...), choices (..., A)."""

  scores: np.ndarray
  log_z: np.ndarray
  load: np.ndarray
  expert: np.ndarray
  counted: np.ndarray
  valid: np.ndarray

  def at(self, *index):
    """Returns the tokens at an index of the leading dims, in one dim."""
    dims = self.valid.ndim
    take = lambda leaf: leaf[index].reshape(-1, *leaf.shape[dims:])  # noqa: E731
    return RouterInputs(*(take(getattr(self, field.name)) for field in dataclasses.fields(self)))


def softmax(logits):
  raised = np.exp(logits - logits.max(-1, keepdims=True))
  return raised / raised.sum(-1, keepdims=True)


def of_router(logits, expert, valid, scores=softmax):
  """Returns what a router did that counts every choice."""
  log_z = np.log(np.exp(logits).sum(-1))
  counted = np.ones(expert.shape, bool)
  return RouterInputs(scores(logits), log_z, softmax(2 * logits), expert, counted, valid)


def counts_of(seen):
  """How often each expert was chosen by a valid token, by a loop."""
  counts = np.zeros(seen.scores.shape[-1])
  for token in np.flatnonzero(seen.valid):
    for choice in seen.expert[token][seen.counted[token]]:
      counts[choice] += 1
  return counts


def share_of(seen):
  counts = counts_of(seen)
  return counts / max(counts.sum(), 1)


def mean_shares(seen):
  """P_i = 1/T sum_t s_it / sum_j s_jt, as in DeepSeek-V3's equations 19 and 20, by a loop."""
  total = np.zeros(seen.scores.shape[-1])
  for token in np.flatnonzero(seen.valid):
    whole = seen.scores[token].sum()
    total += seen.scores[token] / whole if whole else 0
  return total / max(seen.valid.sum(), 1)


def load_balance(config, layer, seen):
  """E sum_i f_i p_i."""
  return layer.num_experts * np.sum(share_of(seen) * mean_shares(seen))


def router_z(config, layer, seen):
  """The mean over tokens of logsumexp squared."""
  total = sum(seen.log_z[token] ** 2 for token in np.flatnonzero(seen.valid))
  return total / max(seen.valid.sum(), 1)


def mean_scores(seen):
  return seen.scores[seen.valid].sum(0) / max(seen.valid.sum(), 1)


def entropy(p):
  return -sum(share * np.log(share) for share in p if share > 0)


def mutual_information(config, layer, seen):
  """sum_m p(m) log p(m) - 1/|X| sum_x sum_m g(m|x) log g(m|x)."""
  own = sum(entropy(seen.scores[token]) for token in np.flatnonzero(seen.valid))
  return own / max(seen.valid.sum(), 1) - entropy(mean_scores(seen))


def load_concentration(config, layer, seen):
  """- sum_m p(m) log p(m)."""
  return entropy(mean_scores(seen))


def idle_of(layer):
  num = layer.experts.num_zero_compute(layer.num_experts)
  return np.arange(layer.num_experts) >= layer.num_experts - num


def null_averaged(config, layer, seen):
  """(n + m) sum_i f~_i p_i, with f~ of a null expert the mean over null experts."""
  share, idle = share_of(seen), idle_of(layer)
  share[idle] = share[idle].mean()
  return len(share) * np.sum(share * mean_shares(seen))


def heterogeneous(config, layer, seen):
  """E sum_i eta_i f_i P_i, eta 1 for those that compute and tau for the others."""
  eta = np.where(idle_of(layer), config.idle, 1)
  return len(eta) * np.sum(eta * share_of(seen) * mean_shares(seen))


def latency_aware(config, layer, seen):
  """SCV(alpha S) + SCV(alpha Q)."""
  alpha = np.asarray(config.latency or np.ones(layer.num_experts))
  alpha = alpha / alpha.sum()
  total = 0.0
  for scores in (seen.scores, seen.load):
    weighed = alpha * scores[seen.valid].sum(0)
    total += (weighed.std() / weighed.mean()) ** 2 if weighed.any() else 0.0
  return total


def sparsity(config, layer, seen):
  """The mean over tokens of sum_e f_e R(x)_e, f_e = E / (k T) times e's choices, or 1."""
  load = np.ones(layer.num_experts)
  if config.by_load:
    load = counts_of(seen) * len(load)
    load = load / (layer.num_active * max(seen.valid.sum(), 1))
  each = [load @ seen.scores[token] for token in np.flatnonzero(seen.valid)]
  return sum(each) / max(len(each), 1)


LOSSES = {
  LoadBalance: load_balance,
  RouterZ: router_z,
  MutualInformation: mutual_information,
  LoadConcentration: load_concentration,
  NullAveraged: null_averaged,
  Heterogeneous: heterogeneous,
  LatencyAware: latency_aware,
  Sparsity: sparsity,
}


def step_loss(config, layer, num_groups, seen):
  """The loss of a step over microbatches x rows x tokens, (M, B, L) of everything seen."""
  over = lambda *index: LOSSES[type(config)](config, layer, seen.at(*index))  # noqa: E731
  valid, every = seen.valid, slice(None)
  num_micro, num_rows = valid.shape[:2]
  if config.scope == "sequence":
    held = np.argwhere(valid.any(-1))
    return sum(over(micro, row) for micro, row in held) / max(len(held), 1)
  if config.scope == "micro":
    size = num_rows // num_groups
    groups = [slice(start, start + size) for start in range(0, num_rows, size)]
    return np.mean([over(micro, group) for micro in range(num_micro) for group in groups])
  if config.scope == "data_parallel":
    return np.mean([over(micro, every) for micro in range(num_micro)])
  if config.scope == "global":
    return over(every, every)
  # global_running: what each microbatch believes, by its share of the tokens.
  believed = [over(slice(micro + 1), every) for micro in range(num_micro)]
  share = valid.sum((1, 2)) / max(valid.sum(), 1)
  return np.sum(share * believed) if not config.additive else over(every, every)
