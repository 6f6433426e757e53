"""Experts: rows in, rows out. An expert family is a record; `build` gives its weights.

To add one, write its file, add one line to EXPERTS, and the contract test runs it. NETWORKS are
those of one kind, which other families are made of.
"""

from jaxmoe.moe.experts.networks import NETWORKS
from jaxmoe.moe.experts.swiglu import SwiGLU

EXPERTS = {**NETWORKS}

__all__ = ["EXPERTS", "NETWORKS", "SwiGLU"]
