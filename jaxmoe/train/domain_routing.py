"""Routing by domain: mutual information of domains and experts, and whether it is chance.

The figure is the mutual information between the domain of a token and the expert of one of its
choices, in bits: 0 where routing does not know the domain, at most min(H(domain), H(expert)). A
finite sample is never exactly 0, so it is told with a band: the middle 95% of the same figure when
the domains change places among rows. Rows, not tokens, change places, because the tokens of a row
belong together; a band over tokens would be too narrow by far.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SHUFFLES = 200


def mutual_information(counts_DE: np.ndarray) -> float:
  """Returns I(domain; expert) in bits of a table of choices; 0 of an empty one."""
  return float(_information(np.asarray(counts_DE, np.float64)[None])[0])


def routing_table(
  rows_RE: np.ndarray, domain_R: np.ndarray, domains: tuple[str, ...], seed: int = 0
) -> dict[str, Any]:
  """Returns what a line of metrics says of the routing of one layer.

  Args:
    rows_RE: Choices of each expert by row.
    domain_R: The index of the domain of each row.
    domains: Their names.
    seed: Of the shuffles.

  Returns:
    `counts` ({domain: choices by expert}), `mutual_information` in bits, and `shuffled_95`, the
    band of the same with shuffled domains.
  """
  label_RD = np.eye(len(domains))[domain_R]
  generator = np.random.default_rng(seed)
  counts_DE = label_RD.T @ rows_RE
  shuffled = _information(
    np.stack([generator.permutation(label_RD).T @ rows_RE for _ in range(SHUFFLES)])
  )
  return {
    "counts": {name: counts_DE[i].astype(int).tolist() for i, name in enumerate(domains)},
    "mutual_information": round(mutual_information(counts_DE), 6),
    "shuffled_95": [round(float(bits), 6) for bits in np.quantile(shuffled, (0.025, 0.975))],
  }


def _information(counts_NDE: np.ndarray) -> np.ndarray:
  """Returns the mutual information of each of N tables."""
  total_N11 = np.maximum(counts_NDE.sum((1, 2), keepdims=True), 1)
  joint_NDE = counts_NDE / total_N11
  apart_NDE = joint_NDE.sum(2, keepdims=True) * joint_NDE.sum(1, keepdims=True)
  ratio_NDE = np.divide(joint_NDE, apart_NDE, out=np.ones_like(joint_NDE), where=joint_NDE > 0)
  return np.maximum((joint_NDE * np.log2(ratio_NDE)).sum((1, 2)), 0.0)
