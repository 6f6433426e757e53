"""Expert families in float64 NumPy, from the papers: what each expert makes of one token."""

import math

import numpy as np

from jaxmoe.moe.experts.mlp import GELU, ReLUSquared
from jaxmoe.moe.experts.swiglu import SwiGLU


def swiglu(pre):
  """silu(gate) * up of (2, F), and its derivative by both."""
  gate, up = pre
  sigmoid = 1 / (1 + np.exp(-gate))
  by_gate = up * sigmoid * (1 + gate * (1 - sigmoid))
  return gate * sigmoid * up, np.stack([by_gate, gate * sigmoid])


def gelu(pre):
  """x Phi(x) of (1, F), and Phi(x) + x phi(x)."""
  phi = np.array([[(1 + math.erf(x / math.sqrt(2))) / 2 for x in pre[0]]])
  return (pre * phi)[0], phi + pre * np.exp(-(pre**2) / 2) / math.sqrt(2 * math.pi)


def relu_squared(pre):
  """max(x, 0)^2 of (1, F), and 2 max(x, 0)."""
  positive = np.maximum(pre, 0)
  return positive[0] ** 2, 2 * positive


ACTIVATIONS = {SwiGLU: swiglu, GELU: gelu, ReLUSquared: relu_squared}
