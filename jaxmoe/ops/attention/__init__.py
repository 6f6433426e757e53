"""Attention with grouped queries under any boolean mask, by softmax and by stick-breaking.

A backend is `(q_BLNH, k_BSKH, v_BSKH, mask_BLS, scale) -> out_BLNH`: query head n reads key head
n // (N // K); True in the mask means "query l sees key s". Softmax and sums of logarithms are
float32, the result has q's type. A query that sees no key gives exact zeros, and a key that no
query sees changes nothing, bit for bit, in values or gradients, whatever it holds while its
products stay finite. For stick-breaking the order of the keys counts.
"""

from jaxmoe.ops.attention.binary_linear import binarize, binary_linear, empty_state
from jaxmoe.ops.attention.masked_softmax import reference
from jaxmoe.ops.attention.stick_blocks import stick_blocks
from jaxmoe.ops.attention.stick_breaking import stick_breaking
from jaxmoe.ops.attention.xla import xla

BACKENDS = {"reference": reference, "xla": xla}
STICK_BREAKING = {"reference": stick_breaking, "blocks": stick_blocks}

__all__ = [
  "BACKENDS", "STICK_BREAKING", "binarize", "binary_linear", "empty_state", "reference",
  "stick_blocks", "stick_breaking", "xla",
]
