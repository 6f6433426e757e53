import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.config_io import from_plain
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.dispatch import DISPATCHERS, Capacity, Dense
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig

D, E, A, B, L = 6, 5, 2, 2, 7
SEGMENT = np.array([[1, 1, 1, 2, 2, 0, 0], [1] * 7], np.int32)


def tokens_of(segment):
  slot = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], segment.shape)
  return Tokens(slot, slot, jnp.asarray(segment), slot)


def run(config, x, state=None):
  layer = config.build(Init(Keys.from_seed(0)), D)
  graph = nnx.graphdef(layer)
  state = nnx.to_pure_dict(nnx.state(layer)) if state is None else state
  call = lambda state, x: nnx.merge(graph, state)(x, tokens_of(SEGMENT), "carry", None)[::2]  # noqa: E731
  return *jax.jit(call)(state, x), state


def draw():
  return jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)


def test_a_shared_expert_adds_its_dense_network_to_every_token():
  config = MoEConfig(E, A, experts=SwiGLU(4), shared_mlp_dim=3)
  x = draw()
  y, _, state = run(config, x)
  without = {name: child for name, child in state.items() if name != "shared"}
  routed, _, _ = run(MoEConfig(E, A, experts=SwiGLU(4)), x, without)
  gate, up = np.einsum("bld,dgf->gblf", x, state["shared"]["gate_up"])
  right = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(state["shared"]["down"])
  np.testing.assert_allclose(y - routed, right, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(np.asarray(routed)[SEGMENT == 0], 0)


def test_a_gate_multiplies_the_shared_expert_by_the_sigmoid_of_its_logit():
  config = MoEConfig(E, A, experts=SwiGLU(4), shared_mlp_dim=3, shared_gate=True)
  x = draw()
  y, _, state = run(config, x)
  gate = state.pop("shared_gate")
  plain, _, _ = run(dataclasses.replace(config, shared_gate=False), x, state)
  state.pop("shared")
  routed, _, _ = run(MoEConfig(E, A, experts=SwiGLU(4)), x, state)
  share = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ gate))
  np.testing.assert_allclose(y - routed, share * (plain - routed), rtol=1e-4, atol=1e-5)
  ungated = dataclasses.replace(config, shared_gate=False)
  assert config.active_params(D) == ungated.active_params(D) + D


def test_a_gate_without_a_shared_expert_is_refused():
  with pytest.raises(InputError, match="needs a shared expert"):
    MoEConfig(E, A, shared_gate=True)


def test_one_expert_that_every_token_takes_is_a_dense_network():
  x = draw()
  y, sums, state = run(MoEConfig(1, 1, experts=SwiGLU(4)), x)
  gate, up = np.einsum("bld,dgf->gblf", x, state["experts"]["gate_up"][0])
  right = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(state["experts"]["down"][0])
  np.testing.assert_allclose(y, right * (SEGMENT > 0)[..., None], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(sums.router.counts_E, [(SEGMENT > 0).sum()])


def test_counts_are_taken_before_drops_and_drops_stand_beside_them():
  x = draw()
  _, kept, state = run(MoEConfig(E, A, experts=SwiGLU(4), dispatch=Dense()), x)
  _, tight, _ = run(MoEConfig(E, A, experts=SwiGLU(4), dispatch=Capacity(0.5)), x, state)
  jax.tree.map(np.testing.assert_array_equal, kept.router, tight.router)
  rows = Capacity(0.5).rows_per_expert(B * L, A, E)
  lost = np.maximum(np.asarray(kept.router.counts_E) - rows, 0).sum()
  assert kept.dropped == {} and tight.dropped == {"capacity": lost} and lost > 0


@pytest.mark.parametrize(
  "factor, tokens, active, experts, rows",
  [(1.0, 40, 2, 5, 16), (1.25, 40, 2, 5, 20), (1.0, 41, 2, 5, 17), (1e-9, 9, 1, 5, 1),
   (100.0, 9, 2, 5, 9), (1.0, 1, 2, 64, 1), (1.1, 200, 1, 4, 55), (1.1, 50, 2.4, 4, 33),
   (1.15, 3 * 2**20, 8, 12, 2411725), (0.07, 300, 1, 3, 7)],
)  # fmt: skip
def test_capacity_is_the_mean_times_the_factor_rounded_up(factor, tokens, active, experts, rows):
  assert Capacity(factor).rows_per_expert(tokens, active, experts) == rows


def test_a_share_of_idle_experts_is_the_decimal_it_is_written_as():
  # 0.7 * 1200 / (0.7 * 4 + 1.4 idle ones as often) = 200
  assert Capacity(1.0, idle_share=0.7).rows_per_expert(480, 1, 4, idle=2) == 70


def test_a_run_of_before_has_the_rows_of_float_products():
  plain = {"kind": "capacity", "factor": 1.1}
  config = from_plain(
    MoEConfig, {"dispatch": plain, "exchange": {"kind": "all_to_all", "bound": 1.1}}
  )
  assert config.dispatch.rows_per_expert(200, 1, 4) == config.exchange.rows_per_device(200, 4) == 56


def test_the_stated_active_parameters_are_those_one_token_meets():
  config = MoEConfig(E, A, experts=SwiGLU(4), shared_mlp_dim=3)
  _, _, state = run(config, draw())
  sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(child)) for name, child in state.items()}
  active = sizes["router"] + A * sizes["experts"] // E + sizes["shared"]
  assert config.active_params(D) == active


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_closed_experts_change_no_bit_of_output_sums_and_gradients_and_get_none(dispatch):
  x, parts = draw(), {"experts": SwiGLU(4), "dispatch": DISPATCHERS[dispatch][1]}
  config, closed = MoEConfig(E, A, **parts), MoEConfig(E + 3, A, num_inactive=3, **parts)
  y, sums, state = run(config, x)
  _, _, wide = run(closed, x)
  grown = jax.tree.map(lambda few, many: many.at[:E].set(few), state["experts"], wide["experts"])
  y_closed, sums_closed, _ = run(closed, x, {**state, "experts": grown})
  np.testing.assert_array_equal(y_closed, y)
  jax.tree.map(np.testing.assert_array_equal, sums_closed, sums)

  def gradient(config, state):
    graph = nnx.graphdef(nnx.eval_shape(lambda: config.build(Init(Keys.from_seed(0)), D)))
    loss = lambda state: jnp.sum(nnx.merge(graph, state)(x, tokens_of(SEGMENT), None, None)[0] ** 2)  # noqa: E731
    return jax.jit(jax.grad(loss))(state)

  right, got = gradient(config, state), gradient(closed, {**state, "experts": grown})
  jax.tree.map(np.testing.assert_array_equal, got["router"], right["router"])
  for few, many in zip(*map(jax.tree.leaves, (right["experts"], got["experts"])), strict=True):
    np.testing.assert_array_equal(many[:E], few)
    np.testing.assert_array_equal(many[E:], 0)


@pytest.mark.parametrize("num_inactive", [-1, E - A + 1])
def test_closed_must_leave_the_active_experts_open(num_inactive):
  with pytest.raises(InputError, match="must leave num_active experts open"):
    MoEConfig(E, A, num_inactive=num_inactive)
