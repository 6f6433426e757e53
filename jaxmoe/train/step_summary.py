"""Metrics of a step as plain numbers, from the sums that it returns."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from jaxmoe.core.param_names import ATTENTION, MOE, LayerGroupSizes, by_layer

_OF_CHOICES = ("load_entropy", "max_violation", "drop_rate")
_OF_TOKENS = ("effective_k", "router_z", "pressure")


def summarize(metrics: dict[str, Any], layer_groups: LayerGroupSizes) -> dict[str, Any]:
  """Returns the metrics of a step as JSON-able values; blocks until they are computed.

  Args:
    metrics: What the step returned: sums, and means as (sum, weight).
    layer_groups: How layers are grouped in memory.

  Returns:
    `loss` (nats a token, without balance losses), `total_loss`, `grad_norm`, `learning_rate`,
    `tokens`, `skipped` (steps so far), each balance loss summed over layers, and `layers`: for
    each MoE layer what `layer_summary` says; the same of attention experts under `attention`. A
    number that is not finite is None, and so is the mean of nothing. Where no token had a label
    `labels` is 0, and from then on `unlabelled` tells how many such steps there were.
  """
  host = jax.device_get(metrics)
  host.pop("unmoved", None)  # told by an event, like these below
  sums = host.pop("layers")
  layers, attention = (by_layer(sums, layer_groups, part) for part in (MOE, ATTENTION))
  for name in ("finite", "in_a_row"):  # told by events
    del host[name]
  balance, loss, unlabelled = (host.pop(name) for name in ("balance", "loss", "unlabelled"))
  scalars = {"loss": loss.sum / np.maximum(loss.weight, 1), **host, **balance}
  plain: dict[str, Any] = {name: number(value) for name, value in scalars.items()}
  if not loss.weight:
    plain |= {"loss": None, "total_loss": None, "grad_norm": None, "labels": 0}
  if not host["tokens"]:
    plain |= dict.fromkeys(balance)
  if unlabelled:
    plain["unlabelled"] = number(unlabelled)
  plain["layers"] = {str(depth): layer_summary(sums) for depth, sums in layers.items()}
  if attention:
    plain["attention"] = {str(depth): layer_summary(sums) for depth, sums in attention.items()}
  return plain


def layer_summary(sums: Any) -> dict[str, Any]:
  """Returns how a MoE layer was used over the tokens of a step.

  Returns:
    `load` (share of choices by expert, before drops; zeros where there were none), `load_entropy`
    (of that, as a share of log E), `max_violation` (largest load over the mean, minus 1), `dead`
    (experts never chosen), `drop_rate` (dropped choices over choices) and by reason where there are
    reasons, `effective_k` (choices that had a row, per token: not dropped, nor of an expert that
    computes nothing), `router_z` (mean squared logsumexp of the logits), and of a router that keeps
    one `pressure` (the factor of adaptive balance losses in this step). What is a mean over choices
    or tokens is None where there were none.
  """
  counts_E = np.asarray(sums.router.counts_E, np.float64)
  choices = max(counts_E.sum(), 1.0)
  load_E = counts_E / choices
  used_E = load_E[load_E > 0]
  entropy = float(-(used_E * np.log(used_E)).sum()) / math.log(max(len(load_E), 2))
  tokens = max(float(sums.router.tokens), 1.0)
  dropped = {reason: float(count) for reason, count in sums.dropped.items()}
  rows = counts_E.sum() - sum(dropped.values()) - float(sums.idle)
  summary = {
    "load": [number(np.float32(share)) for share in load_E],
    "load_entropy": number(np.float32(entropy)),
    "max_violation": number(np.float32(load_E.max() * len(load_E) - 1)),
    "dead": int((counts_E == 0).sum()),
    "drop_rate": number(np.float32(sum(dropped.values()) / choices)),
    "dropped": {reason: number(np.float32(count)) for reason, count in dropped.items()},
    "effective_k": number(np.float32(rows / tokens)),
    "router_z": number(sums.router.log_z_squared / tokens),
  }
  if sums.router.adaptive_coefficient is not None:
    summary["pressure"] = number(sums.router.adaptive_coefficient / tokens)
  if not counts_E.any():
    summary |= dict.fromkeys(_OF_CHOICES)
  if not float(sums.router.tokens):
    summary |= dict.fromkeys(name for name in _OF_TOKENS if name in summary)
  return summary


def number(value: Any) -> float | int | None:
  """Returns a plain number with the digits of its own type; None if it is not finite."""
  array = np.asarray(value)
  if np.issubdtype(array.dtype, np.integer):
    return int(array)
  # The shortest decimal that reads back as the same float32, not its float64 expansion.
  return float(str(np.float32(array))) if np.isfinite(array) else None
