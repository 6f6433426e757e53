"""Keys and values stay, queries travel, and what they find goes straight back (TokenRing).

TokenRing (Wang et al. 2024, arXiv:2412.20501): at every step queries go on to the next device while
what they found at this one goes the other way, to the device that owns them. Links carry both
directions at once, so the busier one carries (out, log-sum-exp) of a part a step, where a ring
carries keys and values. With fewer key heads than query heads a ring sends less.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.tokens import Tokens
from jaxmoe.ops.attention import AttentionParts
from jaxmoe.parallel.attend.context_group import ContextGroup, RowSpans
from jaxmoe.parallel.attend.trip import Arrays, Trip, add, like, run, zeros


def token_ring(
  parts: AttentionParts, arrays: Arrays, tokens: Tokens, mask: Any, group: ContextGroup
) -> jax.Array:
  """Returns what queries find among the keys of whole rows, wherever these are.

  Sends `hops` parts of queries one way and as many of what they found the other, forward; backward
  queries and gradients of what was found one way, gradients of queries the other. All of it in the
  dtype of queries, as a ring sends keys and values, but for log-sum-exps, which are float32.
  """
  trip = Trip.of(parts, arrays[0], mask, group)
  return run(functools.partial(_token_ring, trip), parts, arrays, tokens, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_ring(trip: Trip, weights: Any, q: Any, k: Any, v: Any, spans: RowSpans) -> Any:
  return _forward(trip, weights, q, k, v, spans)[0]


def _forward(trip: Trip, weights: Any, q: Any, k: Any, v: Any, spans: RowSpans) -> Any:
  shift, far = trip.group.shift, None
  moving = shift(q, -trip.hops)
  found = [trip.find(spans, 0, 0)(weights, q, k, v)]
  # A device has the queries of that `back` places after it: the farthest keys come first.
  for back in range(trip.hops, 0, -1):
    here = moving
    if back > 1:
      moving = shift(here, 1)
    part = trip.shift_part(trip.find(spans, -back, 0)(weights, here, k, v), back, q.dtype)
    found.insert(1, part)
    far = trip.merge(part, far)
  total = trip.merge(found[0], far)
  return total, (weights, q, k, v, spans, trip.algebra.kept(found, total))


def _backward(trip: Trip, saved: Any, dtotal: Any) -> Any:
  weights, q, k, v, spans, kept = saved
  algebra, shift, far = trip.algebra, trip.group.shift, None
  ready = [algebra.ready(one, dtotal) for one in kept]
  sums, dq = zeros((weights, k, v)), zeros(q)
  moving = shift((q, dtotal.out_BLNP.astype(q.dtype)), -trip.hops)
  numbers, made = shift(ready[trip.hops], -trip.hops), None
  for back in range(trip.hops, -1, -1):
    here_q, dout = moving if back else (q, dtotal.out_BLNP)
    if back > 1:
      moving = shift(moving, 1)
    known = numbers
    if back:  # all are known from the start: one is sent at a time, so that products hide it
      later, _ = jax.lax.optimization_barrier((ready[back - 1], made))
      numbers = shift(later, 1 - back)
    part, pull = jax.vjp(trip.find(spans, -back, 0), weights, here_q, k, v)
    dpart = algebra.pull(part, dout.astype(jnp.float32), known, far)
    dweights, more, dk, dv = pull(dpart)
    made = dk
    sums, dq = add(sums, (dweights, dk, dv)), add(dq, shift(more, back))
    # What is farther goes on with the queries, to the next nearer keys.
    far = trip.shift_part(trip.merge(part, far), 1, q.dtype) if algebra.ordered else None
  dweights, dk, dv = like(sums, (weights, k, v))
  return dweights, like(dq, q), dk, dv, None


_token_ring.defvjp(_forward, _backward)
