"""Balance losses in float64 NumPy: what a loss is over a set of tokens, and which sets there are.

A loss is `loss(config, layer, logits, expert, valid)` over tokens in any order. A router's noise
is stood for by a load of softmax(2 logits).
"""

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


def softmax(logits):
  raised = np.exp(logits - logits.max(-1, keepdims=True))
  return raised / raised.sum(-1, keepdims=True)


def counts_of(expert, valid, num_experts):
  """How often each expert was chosen by a valid token, by a loop."""
  counts = np.zeros(num_experts)
  for token in np.flatnonzero(valid):
    for choice in expert[token]:
      counts[choice] += 1
  return counts


def load_balance(config, layer, logits, expert, valid):
  """E sum_i f_i p_i."""
  counts = counts_of(expert, valid, logits.shape[-1])
  mean = softmax(logits)[valid].sum(0) / max(valid.sum(), 1)
  return logits.shape[-1] * np.sum(counts / max(counts.sum(), 1) * mean)


def router_z(config, layer, logits, expert, valid):
  """The mean over tokens of logsumexp squared."""
  total = sum(np.log(np.exp(logits[token]).sum()) ** 2 for token in np.flatnonzero(valid))
  return total / max(valid.sum(), 1)


def mean_scores(logits, valid):
  return softmax(logits)[valid].sum(0) / max(valid.sum(), 1)


def entropy(p):
  return -sum(share * np.log(share) for share in p if share > 0)


def mutual_information(config, layer, logits, expert, valid):
  """sum_m p(m) log p(m) - 1/|X| sum_x sum_m g(m|x) log g(m|x)."""
  own = sum(entropy(softmax(logits[token])) for token in np.flatnonzero(valid))
  return own / max(valid.sum(), 1) - entropy(mean_scores(logits, valid))


def load_concentration(config, layer, logits, expert, valid):
  """- sum_m p(m) log p(m)."""
  return entropy(mean_scores(logits, valid))


def idle_of(layer):
  num = layer.experts.num_idle(layer.num_experts)
  return np.arange(layer.num_experts) >= layer.num_experts - num


def null_averaged(config, layer, logits, expert, valid):
  """(n + m) sum_i f~_i p_i, with f~ of a null expert the mean over null experts."""
  counts, idle = counts_of(expert, valid, logits.shape[-1]), idle_of(layer)
  share = counts / max(counts.sum(), 1)
  share[idle] = share[idle].mean()
  return len(share) * np.sum(share * mean_scores(logits, valid))


def heterogeneous(config, layer, logits, expert, valid):
  """E sum_i eta_i f_i P_i, eta 1 for those that compute and tau for the others."""
  counts = counts_of(expert, valid, logits.shape[-1])
  eta = np.where(idle_of(layer), config.idle, 1)
  return len(eta) * np.sum(eta * counts / max(counts.sum(), 1) * mean_scores(logits, valid))


def latency_aware(config, layer, logits, expert, valid):
  """SCV(alpha S) + SCV(alpha Q)."""
  alpha = np.asarray(config.latency or np.ones(layer.num_experts))
  alpha = alpha / alpha.sum()
  total = 0.0
  for scores in (softmax(logits), softmax(2 * logits)):
    weighed = alpha * scores[valid].sum(0)
    total += (weighed.std() / weighed.mean()) ** 2 if valid.any() else 0.0
  return total


def sparsity(config, layer, logits, expert, valid):
  """The mean over tokens of sum_e f_e R(x)_e, f_e = E / (k T) times e's choices, or 1."""
  load = np.ones(logits.shape[-1])
  if config.by_load:
    load = counts_of(expert, valid, len(load)) * len(load)
    load = load / (layer.num_active * max(valid.sum(), 1))
  each = [load @ softmax(logits[token]) for token in np.flatnonzero(valid)]
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


def step_loss(config, layer, num_groups, logits, expert, valid):
  """The loss of a step over microbatches x rows x tokens: (M, B, L, E), (M, B, L, A), (M, B, L)."""

  def over(micro, rows):
    return LOSSES[type(config)](
      config, layer,
      logits[micro, rows].reshape(-1, logits.shape[-1]),
      expert[micro, rows].reshape(-1, expert.shape[-1]),
      valid[micro, rows].reshape(-1),
    )

  num_micro, num_rows = valid.shape[:2]
  every = slice(None)
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
