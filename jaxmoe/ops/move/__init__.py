"""Rows for experts: what is known of each token, in the order in which experts read it.

A back end is `(values_TF, token_R) -> rows_RF`, of any dtype and any dims after the first. A token
of T, which is none, gives zeros and gets, and gives, no gradient.

Sizes of a need: T, R, D.
"""

from jaxmoe.core.backends import Backend
from jaxmoe.ops.move.gather import gather
from jaxmoe.ops.move.reference import reference

BACKENDS: dict[str, Backend] = {"gather": Backend(gather), "reference": Backend(reference)}

__all__ = ["BACKENDS", "gather", "reference"]
