"""Balance losses in float64 NumPy: what a loss is over a set of tokens, and which sets there are.

A loss is `loss(config, layer, scores, logits, expert, valid)` over tokens in any order. Counts
are constants: `held` replaces their share where a gradient is taken.
"""

import numpy as np

from jaxmoe.moe.balance import LoadBalance, RouterZ


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


LOSSES = {LoadBalance: load_balance, RouterZ: router_z}


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
