"""The sight of queries: a span of key slots for each, from which a mask of pairs follows.

Slots are places in a row (or in a cache), so that a part of a row's keys, in whatever order, has
the slots it has in the row, and spans need not know which part it is.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp

NO_SLOT = -1
"""The slot of a key that nobody sees."""
NOTHING = (jnp.iinfo(jnp.int32).max, -2)
"""The span of a query that sees nothing: it starts after it ends, whatever it is joined with."""

SINKS, ANY_MASK = "sinks", "masks that are no span"
"""What a need is said to have that not every back end has."""


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["first_BL", "last_BL", "slot_BS", "sink_N", "mask_BLS"],
  meta_fields=["scale"],
)
@dataclasses.dataclass(frozen=True)
class Sight:
  """What queries see, and what their scores are multiplied by.

  Attributes:
    first_BL: int32, the first slot that a query sees.
    last_BL: The last one; before the first for a query that sees nothing, see `NOTHING`.
    slot_BS: int32, the slot of each key; `NO_SLOT` for one that nobody sees.
    scale: What products of queries and keys are multiplied by.
    sink_N: One more score of every query of a head, of a key whose value is zero (gpt-oss); joined
      once, after all parts of the keys; None for none.
    mask_BLS: For a mask that is no span, which query sees which key; else None, as the other three
      are where it is not.
  """

  first_BL: jax.Array | None
  last_BL: jax.Array | None
  slot_BS: jax.Array | None
  scale: float = 1.0
  sink_N: jax.Array | None = None
  mask_BLS: jax.Array | None = None

  @classmethod
  def of_mask(cls, mask_BLS: jax.Array, scale: float = 1.0) -> Sight:
    """Returns the sight of any mask, which back ends that go by spans cannot serve."""
    return cls(None, None, None, scale, None, mask_BLS)

  @property
  def features(self) -> frozenset[str]:
    """What not every back end has, as a need of one names it."""
    named = {SINKS: self.sink_N, ANY_MASK: self.mask_BLS}
    return frozenset(name for name, of in named.items() if of is not None)

  def dense(self) -> jax.Array:
    """Returns (B, L, S) bool, which query sees which key."""
    if self.mask_BLS is not None:
      return self.mask_BLS
    first_BL, last_BL, slot_BS = self.spans
    return sees(first_BL, last_BL, slot_BS)

  @property
  def spans(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First and last slots of queries, and slots of keys.

    Raises:
      ValueError: of a mask that is no span.
    """
    if self.first_BL is None or self.last_BL is None or self.slot_BS is None:
      raise ValueError("this mask is no span of slots; only `dense` says what it shows")
    return self.first_BL, self.last_BL, self.slot_BS

  def without_sink(self) -> Sight:
    """Returns what a part of the keys is seen with, before parts are merged."""
    return dataclasses.replace(self, sink_N=None)

  def check(self, q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKP: jax.Array) -> None:
    """Refuses arrays of other shapes, and key heads that do not divide query heads."""
    batch, length, heads, _ = q_BLNH.shape
    slots, kv_heads = k_BSKH.shape[1:3]
    if self.mask_BLS is None:
      chex.assert_shape([self.first_BL, self.last_BL], (batch, length))
      chex.assert_shape(self.slot_BS, (batch, slots))
    else:
      chex.assert_shape(self.mask_BLS, (batch, length, slots))
    chex.assert_shape(v_BSKP, (batch, slots, kv_heads, None))
    if heads % kv_heads:
      raise ValueError(
        f"key heads must divide query heads: num_heads={heads} num_kv_heads={kv_heads}"
      )


def sees(first_L: jax.Array, last_L: jax.Array, slot_S: jax.Array) -> jax.Array:
  """Returns (..., L, S) bool, which span holds which slot."""
  slot_1S = slot_S[..., None, :]
  return (first_L[..., None] <= slot_1S) & (slot_1S <= last_L[..., None])
