"""What is special about the back end for few rows: what it costs, and when it is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.backends import Chooser, Devices
from jaxmoe.hlo.compiled import flops
from jaxmoe.ops.expert_mlp import BACKENDS, few, fused

S, D, G, F, A = 8, 16, 2, 24, 2


def swiglu(pre):
  return jax.nn.silu(pre[..., 0, :]) * pre[..., 1, :]


def arrays(tokens):
  rng = np.random.default_rng(tokens)
  shapes = (tokens, D), (S, D, G, F), (S, F, D)
  slot_TA = np.argsort(rng.random((tokens, S)), axis=1)[:, :A].astype(np.int32)
  weight_TA = rng.random((tokens, A)).astype(np.float32)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes] + [slot_TA, weight_TA]


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_matrix_flops_are_those_of_the_choices(tokens):
  needed = 2 * tokens * A * (G + 1) * D * F
  cost = {
    layer: flops(jax.jit(lambda *x, f=layer: f(*x, swiglu)).lower(*arrays(tokens)).compile())
    for layer in (few, fused)
  }
  assert (cost[few].matmul, cost[few].unknown_loops) == (needed, 0)
  # Each expert's own rows: for few tokens, four of which choose it in the mean, they are eight.
  assert cost[fused].matmul == S * 8 * (G + 1) * 2 * D * F


def test_other_tokens_never_change_a_row_bit_for_bit():
  x, gate_up, down, slot_TA, weight_TA = arrays(4)
  run = jax.jit(lambda x, slot_TA: few(x, gate_up, down, slot_TA, weight_TA, swiglu))
  before = np.asarray(run(x, slot_TA))
  for token in range(4):
    others = np.arange(4) != token
    other_x = np.where(others[:, None], -3 * x, x)
    other_slots = np.where(others[:, None], (slot_TA + 3) % (S + 1), slot_TA)
    np.testing.assert_array_equal(np.asarray(run(other_x, other_slots))[token], before[token])


@pytest.mark.parametrize(
  "platform, tokens, name",
  [("cpu", 4, "few"), ("cpu", 5, "fused"), ("gpu", 1, "fused"), ("tpu", 1, "rows")],
)
def test_it_is_chosen_on_a_cpu_for_no_more_choices_than_experts(platform, tokens, name):
  sizes = dict(zip("TASDGF", (tokens, A, S, D, G, F), strict=True))
  choose = functools.partial(Chooser(Devices(platform)).choose, "expert_mlp", BACKENDS)
  assert choose(jnp.float32, sizes) is BACKENDS[name]
