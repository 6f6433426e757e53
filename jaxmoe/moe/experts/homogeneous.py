"""Experts of one kind, E times the same network: NETWORKS, which other families are made of."""

from jaxmoe.moe.experts.clamped_swiglu import ClampedSwiGLU
from jaxmoe.moe.experts.mlp import GELU, ReLUSquared
from jaxmoe.moe.experts.swiglu import SwiGLU

NETWORKS = {
  "swiglu": (SwiGLU, SwiGLU(mlp_dim=32)),
  "clamped_swiglu": (ClampedSwiGLU, ClampedSwiGLU(mlp_dim=32, limit=1.0)),
  "gelu": (GELU, GELU(mlp_dim=32)),
  "relu_squared": (ReLUSquared, ReLUSquared(mlp_dim=32)),
}
