"""Experts of one kind, E times the same network: NETWORKS, which other families are made of."""

from jaxmoe.moe.experts.clamped_swiglu import ClampedSwiGLU
from jaxmoe.moe.experts.mlp import GELU, ReLUSquared
from jaxmoe.moe.experts.swiglu import SwiGLU

NETWORKS = {
  "swiglu": (SwiGLU, SwiGLU(hidden=32)),
  "clamped_swiglu": (ClampedSwiGLU, ClampedSwiGLU(hidden=32, limit=1.0)),
  "gelu": (GELU, GELU(hidden=32)),
  "relu_squared": (ReLUSquared, ReLUSquared(hidden=32)),
}
