"""Experts: rows in, rows out. An expert family is a record; `build` gives its weights.

To add one, write its file, add one line to EXPERTS, and the contract test runs it.
"""

from jaxmoe.moe.experts.swiglu import SwiGLU

EXPERTS = {"swiglu": (SwiGLU, SwiGLU(hidden=32))}

__all__ = ["EXPERTS", "SwiGLU"]
