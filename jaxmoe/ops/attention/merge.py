"""Softmax attention over parts of the keys, put together; a sink joins once, last.

Parts that no key is in twice merge in any order and grouping: with l the log-sum-exp of a part's
scores and o what it found, l = log(e^l1 + e^l2) and o = e^(l1 - l) o1 + e^(l2 - l) o2, in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class AttentionPart(NamedTuple):
  """What queries find among some keys.

  Attributes:
    out_BLNP: float32, values weighted by a softmax over these keys; zeros where none is seen.
    lse_BLN: float32, the log of the sum of exponentials of the scores; -inf where none is seen.
  """

  out_BLNP: jax.Array
  lse_BLN: jax.Array


def merge(one: AttentionPart, other: AttentionPart) -> AttentionPart:
  """Returns what queries find among the keys of two parts."""
  lse_BLN, (first_BLN, second_BLN) = _sum(one.lse_BLN, other.lse_BLN)
  out_BLNP = first_BLN[..., None] * one.out_BLNP + second_BLN[..., None] * other.out_BLNP
  return AttentionPart(out_BLNP, lse_BLN)


def join_sink(part: AttentionPart, sink_N: jax.Array | None) -> AttentionPart:
  """Returns what is found beside one more score, of a value that is zero."""
  if sink_N is None:
    return part
  sink_BLN = jnp.broadcast_to(sink_N.astype(jnp.float32), part.lse_BLN.shape)
  lse_BLN, (kept_BLN, _) = _sum(part.lse_BLN, sink_BLN)
  return AttentionPart(kept_BLN[..., None] * part.out_BLNP, lse_BLN)


def _sum(one: jax.Array, other: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns log(e^one + e^other), and the share of each in the sum; both may be -inf."""
  peak = jax.lax.stop_gradient(jnp.maximum(one, other))
  peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
  shares = jnp.exp(one - peak), jnp.exp(other - peak)
  total = shares[0] + shares[1]
  some = total > 0
  # Where there is nothing, the gradient of the logarithm is no number: it is not asked for.
  total = jnp.where(some, total, 1.0)
  lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)
  return lse, (shares[0] / total, shares[1] / total)
