"""The experts of the highest rank of each token.

A back end is `(rank_TE, num) -> expert_TA` int32, the highest rank first; ties go to the lower
expert. There is no gradient: what is chosen is discrete.

Sizes of a need: T, E, A.
"""

from jaxmoe.core.backends import Backend
from jaxmoe.ops.top_k.reference import reference
from jaxmoe.ops.top_k.xla import xla

BACKENDS: dict[str, Backend] = {"xla": Backend(xla), "reference": Backend(reference)}

__all__ = ["BACKENDS", "reference", "xla"]
