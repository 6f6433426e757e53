import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.config_io import from_plain, to_plain
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.gates import GATES, CosineGateConfig, MLPGateConfig, ResidualGateConfig
from jaxmoe.moe.routers.tree import TreeGateConfig
from jaxmoe.ops.soft_tree import log_leaves

T, D, E = 20, 6, 5


def build(**fields):
  gate = CosineGateConfig(width=3, **fields).build(Init(Keys.from_seed(0)), D, E)
  graph, state = nnx.graphdef(gate), nnx.to_pure_dict(nnx.state(gate))
  return state, lambda state, x: nnx.merge(graph, state)(x, "carry")[0]


def test_cosine_logits_know_no_length_and_lie_within_one_over_the_temperature():
  state, run = build(temperature=0.25)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(T, D)), jnp.float32)
  logits = np.asarray(run(state, x))
  longer = {**state, "weight": 7 * state["weight"]}
  np.testing.assert_allclose(run(longer, 100 * x), logits, rtol=1e-4, atol=1e-5)
  assert np.abs(logits).max() <= 4.00001 and np.abs(logits).max() > 3
  along_DE = np.linalg.pinv(state["down"]).T @ np.asarray(state["weight"])
  np.testing.assert_allclose(np.diag(run(state, jnp.asarray(along_DE.T))), 4, rtol=1e-4)


def test_the_temperature_never_falls_below_its_least_and_has_no_gradient_there():
  state, run = build(least=0.1)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(T, D)), jnp.float32)
  value = lambda sharpness: jnp.sum(run({**state, "sharpness": sharpness}, x) ** 2)  # noqa: E731
  least = value(jnp.full(1, np.log(10.0)))
  np.testing.assert_allclose(value(jnp.full(1, 9.0)), least, rtol=1e-6)
  assert jax.grad(value)(jnp.full(1, 9.0)) == 0 and jax.grad(value)(jnp.full(1, 2.0)) > 0


def test_a_token_of_zeros_has_logits_of_zero_and_finite_gradients():
  state, run = build()
  value = lambda state, x: jnp.sum(run(state, x) ** 2 + run(state, x))  # noqa: E731
  grads = jax.grad(value, argnums=(0, 1))(state, jnp.zeros((2, D)))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  np.testing.assert_array_equal(run(state, jnp.zeros((2, D))), 0)


@pytest.mark.parametrize("fields", [{"width": 0}, {"least": 0.0}, {"temperature": 0.001}])
def test_a_cosine_gate_that_cannot_be_is_refused(fields):
  with pytest.raises(InputError, match="width must be at least 1, and 0 < least <= temperature"):
    CosineGateConfig(**fields)


@pytest.mark.parametrize("name", sorted(GATES))
def test_a_gate_that_carries_nothing_hands_on_what_it_was_given(name):
  record, keys = GATES[name][1], Init(Keys.from_seed(0))
  given = jnp.ones((2, 4))
  _, carry = record.build(keys, D, 4)(jnp.ones((2, D)), given)
  assert (carry is given) != record.reads_previous


def test_the_layer_before_learns_through_the_logits_it_hands_on():
  gate, rng = ResidualGateConfig().build(Init(Keys.from_seed(0)), D, E), np.random.default_rng(0)
  gate.residual.set_value(jnp.asarray(rng.normal(size=(E, E)), jnp.float32))
  before = jnp.asarray(rng.normal(size=(1, E)), jnp.float32)
  for which in (0, 1):  # what scores are made of, and what the next layer is handed
    slope = jax.grad(lambda carry, of=which: gate(jnp.ones((1, D)), carry)[of][0, 1])(before)
    np.testing.assert_allclose(slope[0], gate.residual.get_value()[:, 1], rtol=1e-6)


# ---- the tree ----


@pytest.mark.parametrize("num_experts", [1, 2, 8])
def test_the_softmax_of_a_trees_logits_is_its_leaves_probabilities(num_experts):
  nodes = 3 * np.random.default_rng(0).normal(size=(T, num_experts - 1))
  logits = log_leaves(jnp.asarray(nodes, jnp.float32))
  assert logits.shape == (T, num_experts)
  np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=1), 0, atol=2e-6)
  np.testing.assert_allclose(jax.nn.softmax(logits), np.exp(logits), rtol=1e-5)


def test_sure_decisions_lead_to_one_leaf_left_first_and_have_finite_gradients():
  # Of nodes 0; 1, 2; 3, 4, 5, 6: right, then (node 2) left, then (node 5) right: leaf 5.
  nodes = jnp.full((1, 7), 500.0).at[0, jnp.array([0, 5])].set(-500.0)
  np.testing.assert_array_equal(np.argmax(log_leaves(nodes)), 5)
  np.testing.assert_allclose(np.exp(log_leaves(nodes))[0, 5], 1)
  grads = jax.grad(lambda nodes: jnp.sum(jax.nn.softmax(log_leaves(nodes)) ** 2))(nodes)
  assert np.isfinite(grads).all()


def test_a_tree_of_other_than_a_power_of_two_leaves_is_refused():
  with pytest.raises(InputError, match="a power of two: 6 open ones; use 4 or 8"):
    MoEConfig(num_experts=6, router=TopK(gate=TreeGateConfig()))


def test_the_mlp_gate_of_a_run_of_before_has_no_bias_and_an_approximate_gelu():
  old = from_plain(MLPGateConfig, {"hidden": 16, "activation": "gelu"})
  assert old == MLPGateConfig(16, bias=False, approximate=True)
  assert to_plain(old, as_before=True)["hidden"] == to_plain(old)["mlp_dim"] == 16
  assert MLPGateConfig(16).num_params(D, E) - old.num_params(D, E) == 16
