"""Attention of a row over context devices, by count: blocks that a device visits, bytes it sends.

Nothing is timed: the devices are virtual ones of one processor. Blocks are those of attention in
blocks, of 128 queries and 128 keys with all heads; what fewer heads visit counts as its share.
"""

from __future__ import annotations

import re
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.core.backends import HERE
from jaxmoe.core.tokens import Tokens
from jaxmoe.hlo.stablehlo import collectives_of_lowered
from jaxmoe.models.attention import softmax_parts
from jaxmoe.models.masks import DocumentMask
from jaxmoe.ops.attention.seen_blocks import cut_spans, seen_blocks
from jaxmoe.parallel.attend import ATTEND, ContextGroup
from jaxmoe.parallel.block_order import Order, imbalance, order_blocks
from jaxmoe.parallel.context_rows import spread_rows

DEVICES, LENGTH, HEADS, KEY_HEADS, SIZE = 4, 8192, 8, 8, 64
BLOCK = 128
DOCUMENTS = {
  "one document": (LENGTH,),
  "16 documents of 512": (512,) * 16,
  "a long one and short ones": (4096, *(128,) * 32),
}
_PLACE = re.compile(r'attend/\w+\.py":\d+')
CHOICES = [(attend, order) for order in typing.get_args(Order) for attend in ATTEND]


def segment_of(lengths: tuple[int, ...]) -> np.ndarray:
  """Returns the document of each token of a row, from 1."""
  return np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)


def blocks_visited(segment_L: np.ndarray, attend: str, order: Order) -> np.ndarray:
  """Returns the pairs of blocks that each device visits, with all heads, float64 (n,).

  Args:
    segment_L: The document of each token.
    attend: A name of ATTEND. Where heads are exchanged for tokens a device has whole rows of 1 / n
      of the heads.
    order: How blocks lie on devices.
  """
  length = len(segment_L)
  starts = np.flatnonzero(np.diff(segment_L, prepend=0))
  first_L = np.repeat(starts, np.diff(starts, append=length)).astype(np.int32)
  slot_L = order_blocks(segment_L, DEVICES, order)
  if attend == "ulysses":
    return np.full(DEVICES, _visits(first_L, slot_L, slot_L) / DEVICES)
  parts = slot_L.reshape(DEVICES, -1)
  if attend == "gather":
    return np.array([_visits(first_L, mine, slot_L) for mine in parts], float)
  return np.array([sum(_visits(first_L, mine, of) for of in parts) for mine in parts], float)


def _visits(first_L: np.ndarray, query_l: np.ndarray, key_s: np.ndarray) -> int:
  """Returns how many pairs of blocks these queries visit among these keys, as a row's slots."""
  first, last, slot = (jnp.asarray(x)[None] for x in (first_L[query_l], query_l, key_s))
  return int(jnp.sum(seen_blocks(*cut_spans((first, last, slot), BLOCK, BLOCK))))


def sent(attend: str, order: Order) -> dict[str, float]:
  """Returns bytes that a device sends for a row, of what the lowered program asks for.

  `hop_bytes` is the busier direction of a ring's step, or all of an exchange, forward; `sent_bytes`
  is all of forward and backward. Needs DEVICES devices.
  """
  mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("context",))
  group = ContextGroup("context", DEVICES, order == "plain")
  parts, rows = softmax_parts(HERE, SIZE**-0.5), PartitionSpec(None, "context")

  def on_device(q: Any, k: Any, v: Any, slot: Any, segment: Any) -> jax.Array:
    here = slot
    if order == "plain":
      here = jnp.broadcast_to(jnp.arange(slot.shape[1], dtype=jnp.int32), slot.shape)
    tokens = spread_rows(Tokens(slot, here, segment, here), "context", order == "plain")
    return ATTEND[attend](parts, (q, k, v), tokens, DocumentMask(), group)

  def run(q: Any, k: Any, v: Any, slot: Any, segment: Any) -> jax.Array:
    return jax.shard_map(
      on_device, mesh=mesh, in_specs=(rows,) * 5, out_specs=rows, check_vma=False
    )(q, k, v, slot, segment)

  def both(q: Any, k: Any, v: Any, slot: Any, segment: Any, weight: Any) -> Any:
    found, pull = jax.vjp(lambda q, k, v: run(q, k, v, slot, segment), q, k, v)
    return found, pull(weight)

  def like(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, rows))

  q, k = (like((1, LENGTH, heads, SIZE), jnp.float32) for heads in (HEADS, KEY_HEADS))
  ids = like((1, LENGTH), jnp.int32)
  forward = collectives_of_lowered(jax.jit(run).lower(q, k, k, ids, ids), mesh)
  whole = collectives_of_lowered(jax.jit(both).lower(q, k, k, ids, ids, q), mesh)
  by_place: dict[tuple[str, ...], float] = {}  # one way is sent by one place of the code
  for one in forward:
    if one.kind == "collective-permute":
      place = tuple(_PLACE.findall(one.scope))
      by_place[place] = by_place.get(place, 0.0) + one.total_wire_bytes
  exchanged = sum(one.total_wire_bytes for one in forward)
  hop = max(by_place.values()) / (DEVICES - 1) if by_place else exchanged
  return {"hop_bytes": hop, "sent_bytes": sum(one.total_wire_bytes for one in whole)}


def rows_of(documents: str, bytes_of: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
  """Returns a row for each strategy and order: blocks, the busiest over the mean, bytes.

  Args:
    documents: A name of DOCUMENTS.
    bytes_of: `sent` by strategy and order.
  """
  segment_L, rows = segment_of(DOCUMENTS[documents]), []
  for attend, order in CHOICES:
    blocks = blocks_visited(segment_L, attend, order)
    even = 1.0 if attend == "ulysses" else imbalance(
      segment_L, order_blocks(segment_L, DEVICES, order), DEVICES
    )  # fmt: skip
    name = f"{attend} {order}"
    counts = {"blocks": float(blocks.max()), "mean_blocks": float(blocks.mean())}
    rows.append({"name": name, **counts, "busiest_pairs": even, **bytes_of[name]})
  return rows
