"""Scaled dot-product attention with grouped queries under any boolean mask.

A backend is `(q_BLNH, k_BSKH, v_BSKH, mask_BLS, scale) -> out_BLNH`: query head n reads key head
n // (N // K); True in the mask means "query l sees key s". The softmax is float32, the result has
q's type. A query that sees no key gives exact zeros, and a key that no query sees changes nothing,
bit for bit, in values or gradients, whatever it holds while its products stay finite.
"""

from jaxmoe.ops.attention.reference import reference
from jaxmoe.ops.attention.xla import xla

BACKENDS = {"reference": reference, "xla": xla}

__all__ = ["BACKENDS", "reference", "xla"]
