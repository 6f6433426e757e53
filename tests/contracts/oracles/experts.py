"""Expert families in float64 NumPy, from the papers: what each expert makes of one token.

`expert(config, params, e, x)` is the output of expert e of the layer for one token;
`combine_weights(config, num_experts, expert, weight)` what the weights of a token's choices become.
`params` is the tree of the module's numbers.
"""

import math

import numpy as np

from jaxmoe.moe.experts.clamped_swiglu import ClampedSwiGLU
from jaxmoe.moe.experts.latent import Latent
from jaxmoe.moe.experts.mixed_primitives import Primitives
from jaxmoe.moe.experts.mlp import GELU, ReLUSquared
from jaxmoe.moe.experts.multi_width import Duo
from jaxmoe.moe.experts.null import Null
from jaxmoe.moe.experts.swiglu import SwiGLU
from jaxmoe.moe.experts.zero_copy_constant import ZeroCopyConstant
from tests.contracts.oracles.routing import softmax


def clamped_swiglu(config, pre):
  """(up + 1) gate sigmoid(alpha gate) of (2, F), cut off at the limit, and its derivative."""
  gate, up = np.minimum(pre[0], config.limit), np.clip(pre[1], -config.limit, config.limit)
  sigmoid = 1 / (1 + np.exp(-config.alpha * gate))
  by_gate = (up + 1) * sigmoid * (1 + config.alpha * gate * (1 - sigmoid))
  inside = np.stack([pre[0] < config.limit, np.abs(pre[1]) < config.limit])
  return (up + 1) * gate * sigmoid, np.stack([by_gate, gate * sigmoid]) * inside


def swiglu(config, pre):
  """silu(gate) * up of (2, F), and its derivative by both."""
  gate, up = pre
  sigmoid = 1 / (1 + np.exp(-gate))
  by_gate = up * sigmoid * (1 + gate * (1 - sigmoid))
  return gate * sigmoid * up, np.stack([by_gate, gate * sigmoid])


def gelu(config, pre):
  """x Phi(x) of (1, F), and Phi(x) + x phi(x)."""
  phi = np.array([[(1 + math.erf(x / math.sqrt(2))) / 2 for x in pre[0]]])
  return (pre * phi)[0], phi + pre * np.exp(-(pre**2) / 2) / math.sqrt(2 * math.pi)


def relu_squared(config, pre):
  """max(x, 0)^2 of (1, F), and 2 max(x, 0)."""
  positive = np.maximum(pre, 0)
  return positive[0] ** 2, 2 * positive


ACTIVATIONS = {
  SwiGLU: swiglu, ClampedSwiGLU: clamped_swiglu, GELU: gelu, ReLUSquared: relu_squared,
}  # fmt: skip


def network(config, params, e, x):
  """down(f(up(x))), with biases where there are any."""
  first = params["gate_up"][e] if "gate_up" in params else params["up"][e][:, None]
  biases = (params[f"{name}_bias"][e] if f"{name}_bias" in params else 0
            for name in ("gate_up", "down"))  # fmt: skip
  pre = np.einsum("d,dgf->gf", x, first) + next(biases)
  return ACTIVATIONS[type(config)](config, pre)[0] @ params["down"][e] + next(biases)


def null(config, params, e, x):
  """Nothing from the last m experts."""
  params = params["kinds"]["true"]
  num_true = len(params["down"])
  return network(config.network, params, e, x) if e < num_true else np.zeros_like(x)


def zero_copy_constant(config, params, e, x):
  """0; x; a1 x + a2 v_j."""
  local, params = params["kinds"].get("local"), params["kinds"]["network"]
  place = e - len(params["down"])
  if place < 0:
    return network(config.network, params, e, x)
  if place < config.num_zero + config.num_copy:
    return x * (place >= config.num_zero)
  constant = place - config.num_zero - config.num_copy
  share = softmax(x @ local["mix"][constant])
  return share[0] * x + share[1] * local["value"][constant]


def duo(config, params, e, x):
  """The SwiGLU network of the expert's width."""
  width = config.widths[e]
  if not width:
    return np.zeros_like(x)
  start = config.widths.index(width)
  return network(SwiGLU(width), params["kinds"][f"from_{start}"], e - start, x)


def primitives(config, params, e, x):
  """A GELU network of what is seen of its weights; x itself."""
  kind = config.kinds[e]
  if kind == "identity":
    return x
  params, e = params["kinds"][kind], e - config.kinds.index(kind)
  if kind == "low_rank":
    pre = x @ params["up_left"][e] @ params["up_right"][e]
    return gelu(config, pre[None])[0] @ params["down_left"][e] @ params["down_right"][e]
  return network(GELU(config.mlp_dim), params, e, x)


def power_of_two(weight):
  """sign(w) 2^round(log2 |w|), the exponent at most 7 below the largest of the matrix."""
  exponent = np.round(np.log2(np.abs(weight)))
  top = exponent.max(axis=(1, 2), keepdims=True)
  return np.sign(weight) * 2.0 ** np.maximum(exponent, top - 7)


def eight_bits(weight):
  """The nearest of 255 equal steps between the largest of a column and its opposite."""
  step = np.abs(weight).max(axis=1, keepdims=True) / 127
  return np.round(weight / step) * step


def latent(config, params, e, x):
  """up(E(down(x)))."""
  return network(config.network, params["network"], e, x @ params["down"]) @ params["up"]


FAMILIES = {
  SwiGLU: network, ClampedSwiGLU: network, GELU: network, ReLUSquared: network,
  Null: null, ZeroCopyConstant: zero_copy_constant, Duo: duo, Latent: latent,
  Primitives: primitives,
}  # fmt: skip


def combine_weights(config, num_experts, expert, weight):
  """w_i over the sum of those that are no null expert, or no zero expert, which have none."""
  if isinstance(config, Null):
    kept = [e < num_experts - config.num_null for e in expert]
  elif isinstance(config, ZeroCopyConstant) and config.zero_gives_weight:
    first = num_experts - config.num_zero - config.num_copy - config.num_constant
    kept = [not first <= e < first + config.num_zero for e in expert]
  else:
    return weight
  weight = np.where(kept, weight, 0)
  return weight / (weight.sum() or 1)


def seen(config, params):
  """What products see of the numbers, and what the gradients of these are taken by."""
  if not isinstance(config, Primitives):
    return params
  coarse = {"shift": power_of_two, "int8": eight_bits}
  return {"kinds": {
    kind: {name: coarse.get(kind, np.asarray)(leaf) for name, leaf in of_kind.items()}
    for kind, of_kind in params["kinds"].items()
  }}  # fmt: skip


def layer(config, num_experts, expert, valid, params, x, scores):
  """sum_a w_a E_a(x) of each token, w the scores of the choices that count over their sum."""
  y = np.zeros_like(x)
  for token, counts in enumerate(valid):
    chosen, weight = expert[token, counts], scores[token, counts]
    for e, w in zip(chosen, combine_weights(config, num_experts, chosen, weight / weight.sum())):
      y[token] += w * FAMILIES[type(config)](config, params, e, x[token])
  return y
