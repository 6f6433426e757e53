"""Keys and values travel around the ring (Ring Attention, Liu et al. 2023, arXiv:2310.01889).

At step s a device has the keys of the device s places before it, and sends them on before it
multiplies with them. The backward pass sends the keys again, the farthest first and then nearer
ones, and their gradients with them, so that nothing of other devices is kept.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from jaxmoe.core.tokens import Tokens
from jaxmoe.ops.attention import AttentionParts
from jaxmoe.parallel.attend.context_group import ContextGroup, RowSpans
from jaxmoe.parallel.attend.trip import Arrays, Trip, add, like, run, zeros


def ring(
  parts: AttentionParts, arrays: Arrays, tokens: Tokens, mask: Any, group: ContextGroup
) -> jax.Array:
  """Returns what queries find among the keys of whole rows, of which one part at a time is here.

  Sends `hops` parts of keys and values one way, forward; backward as many, and as many of their
  gradients in float32.
  """
  trip = Trip.of(parts, arrays[0], mask, group)
  return run(functools.partial(_ring, trip), parts, arrays, tokens, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(trip: Trip, weights: Any, q: Any, k: Any, v: Any, spans: RowSpans) -> Any:
  return _forward(trip, weights, q, k, v, spans)[0]


def _forward(trip: Trip, weights: Any, q: Any, k: Any, v: Any, spans: RowSpans) -> Any:
  moving, found, total = (k, v), [], None
  for step in range(trip.hops + 1):
    here = moving
    if step < trip.hops:
      moving = trip.group.shift(here, 1)
    found.append(trip.find(spans, 0, step)(weights, q, *here))
    total = found[-1] if total is None else trip.algebra.merge(total, found[-1])
  return total, (weights, q, k, v, spans, trip.algebra.kept(found, total))


def _backward(trip: Trip, saved: Any, dtotal: Any) -> Any:
  weights, q, k, v, spans, kept = saved
  algebra, shift = trip.algebra, trip.group.shift
  sums, far = zeros((weights, q)), None
  moving, dmoving = shift((k, v), trip.hops), zeros((k, v))
  for step in range(trip.hops, -1, -1):
    here = moving if step else (k, v)
    if step > 1:
      moving = shift(here, -1)
    part, pull = jax.vjp(trip.find(spans, 0, step), weights, q, *here)
    ready = algebra.ready(kept[step], dtotal)
    *mine, dk, dv = pull(algebra.pull(part, dtotal.out_BLNP, ready, far))
    sums, dmoving = add(sums, tuple(mine)), add(dmoving, (dk, dv))
    if step:
      dmoving = shift(dmoving, -1)
    far = trip.merge(part, far) if algebra.ordered else None
  return *like(sums, (weights, q)), *like(dmoving, (k, v)), None


_ring.defvjp(_forward, _backward)
