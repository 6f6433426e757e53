"""Combining what experts made of rows: each choice of a token times its weight, summed.

A back end is `(rows_RD, row_TA, weight_TA) -> y_TD` in rows.dtype; products and their sum are
float32. A row of R, which is none, counts for nothing. In one shape a token's sum does not depend
on the rows of others, bit for bit.

Sizes of a need: T, A, R, D.
"""

from jaxmoe.core.backends import Backend
from jaxmoe.ops.combine.gather_sum import gather_sum
from jaxmoe.ops.combine.reference import reference

BACKENDS: dict[str, Backend] = {"gather_sum": Backend(gather_sum), "reference": Backend(reference)}

__all__ = ["BACKENDS", "gather_sum", "reference"]
