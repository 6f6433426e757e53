"""Softmax attention with grouped queries under any mask, and linear attention over signs.

A back end is `(q_BLNH, k_BSKH, v_BSKP, sight) -> AttentionPart`: query head n reads key head
n // (N // K), and values may be of another size than keys. A `Sight` says which keys a query sees,
what scores are multiplied by, and sinks; an `AttentionPart` is what was found and the log-sum-exp,
both float32, so that parts of the keys merge. A query that sees no key gives exact zeros, and a key
that no query sees changes nothing, bit for bit, in values or gradients, whatever it holds while its
products stay finite.

Sizes of a need: B, L, S, N, K, H, P; features: `SINKS`, `ANY_MASK`, `OTHER_SIZE`.
"""

from jaxmoe.core.backends import Backend, limited, unmeasured
from jaxmoe.ops.attention.binary_linear import (
  binarize,
  binary_linear,
  empty_state,
  join_states,
  state_after,
)
from jaxmoe.ops.attention.blocks import blocks, for_long_rows
from jaxmoe.ops.attention.choice import OTHER_SIZE, attend
from jaxmoe.ops.attention.masked_softmax import reference
from jaxmoe.ops.attention.merge import AttentionPart, join_sink, merge
from jaxmoe.ops.attention.mosaic_tpu import mosaic_tpu
from jaxmoe.ops.attention.parts import SOFTMAX_PARTS, AttentionParts, PartAlgebra
from jaxmoe.ops.attention.sight import ANY_MASK, NO_SLOT, NOTHING, SINKS, Sight
from jaxmoe.ops.attention.tpu_walk import fits_tpu
from jaxmoe.ops.attention.xla import xla

BACKENDS: dict[str, Backend] = {
  "blocks": Backend(blocks, limited(features=(SINKS, OTHER_SIZE)), for_long_rows),
  "reference": Backend(reference),
  "xla": Backend(xla, limited(features=(ANY_MASK,))),
  "mosaic_tpu": Backend(mosaic_tpu, fits_tpu((SINKS, OTHER_SIZE)), unmeasured),
}

__all__ = [
  "ANY_MASK", "BACKENDS", "NOTHING", "NO_SLOT", "OTHER_SIZE", "SINKS", "SOFTMAX_PARTS",
  "AttentionPart", "AttentionParts", "PartAlgebra", "Sight", "attend", "binarize", "binary_linear",
  "blocks", "empty_state", "join_sink", "join_states", "merge", "reference", "state_after", "xla",
]  # fmt: skip
