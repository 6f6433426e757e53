import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.parameters import Init
from jaxmoe.core.rng import Keys
from jaxmoe.moe.dispatch.plan import Ragged, Uniform
from jaxmoe.moe.experts import NETWORKS
from jaxmoe.ops.grouped_matmul import BACKENDS
from tests.contracts.oracles import experts as oracles

D, E, R = 6, 4, 20
network = pytest.mark.parametrize(
  "experts", [instance for _, instance in NETWORKS.values()], ids=NETWORKS.keys()
)
backend = pytest.mark.parametrize("name", ["uniform", *BACKENDS])
SIZES = {
  "sizes that divide nothing": [7, 1, 3, 9],
  "no row for an expert": [12, 0, 8, 0],
  "all rows on one expert": [0, 20, 0, 0],
  "one row": [0, 0, 1, 0],
  "rows left over": [3, 2, 0, 4],
  "no rows": [0, 0, 0, 0],
}


def network_oracle(network, params, expert, row, grad_out):
  """down(f(up(x))) of one row, and the gradients of x and both matrices, in float64."""
  first = next(key for key in params if key != "down")
  up = params[first][expert].reshape(D, -1, params["down"].shape[1])
  hidden, slope = oracles.ACTIVATIONS[network](np.einsum("d,dgf->gf", row, up))
  grad_pre = slope * (params["down"][expert] @ grad_out)
  grads = {
    first: np.einsum("d,gf->dgf", row, grad_pre).reshape(params[first][expert].shape),
    "down": np.outer(hidden, grad_out),
  }
  return hidden @ params["down"][expert], np.einsum("gf,dgf->d", grad_pre, up), grads


def build(experts, seed=0):
  module = experts.build(Init(Keys.from_seed(seed)), D, E)
  return nnx.graphdef(module), nnx.to_pure_dict(nnx.state(module))


def groups_of(name, sizes):
  if name == "uniform":
    return Uniform(jnp.asarray(sizes, jnp.int32), R // E)
  return Ragged(jnp.asarray(sizes, jnp.int32), BACKENDS[name])


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(graph, name, state, rows, sizes, grad_out):
  """Returns outputs and the gradients of the weights and of the rows."""
  compute = lambda state, rows: nnx.merge(graph, state)(rows, groups_of(name, sizes))  # noqa: E731
  out, vjp = jax.vjp(compute, state, rows)
  return out, *vjp(grad_out.astype(out.dtype))


def draw(seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(R, D)).astype(np.float32), rng.normal(size=(R, D)).astype(np.float32)


def test_every_network_has_an_oracle():
  assert {cls for cls, _ in NETWORKS.values()} == oracles.ACTIVATIONS.keys()


@network
@backend
def test_values_and_gradients_equal_the_float64_loop(experts, name):
  graph, state = build(experts)
  params = {key: np.asarray(leaf, np.float64) for key, leaf in state.items()}
  rows, grad_out = draw()
  for case, sizes in SIZES.items() if name != "uniform" else [("equal", [R // E] * E)]:
    out, grads, grad_rows = run(graph, name, state, rows, jnp.array(sizes), grad_out)
    right, right_rows = np.zeros((R, D)), np.zeros((R, D))
    right_grads = {key: np.zeros_like(leaf) for key, leaf in params.items()}
    for at, expert in enumerate(np.repeat(np.arange(E), sizes)):
      right[at], right_rows[at], of_row = network_oracle(
        type(experts), params, expert, rows[at], grad_out[at]
      )
      for key, grad in of_row.items():
        right_grads[key][expert] += grad
    np.testing.assert_allclose(out, right, rtol=1e-5, atol=5e-6, err_msg=case)
    np.testing.assert_allclose(grad_rows, right_rows, rtol=1e-5, atol=2e-5, err_msg=case)
    for key, grad in right_grads.items():
      np.testing.assert_allclose(grads[key], grad, rtol=1e-5, atol=3e-5, err_msg=case)


@network
def test_the_gradients_of_the_oracle_are_its_finite_differences(experts):
  _, state = build(experts)
  params = {key: np.asarray(leaf, np.float64) for key, leaf in state.items()}
  rng, oracle = np.random.default_rng(3), functools.partial(network_oracle, type(experts))
  row, grad_out = rng.normal(size=D), rng.normal(size=D)
  _, grad_row, grads = oracle(params, 1, row, grad_out)
  ways = {key: rng.normal(size=leaf.shape) for key, leaf in params.items()}
  way = rng.normal(size=D)
  right = np.sum(way * grad_row) + sum(np.sum(ways[key][1] * grads[key]) for key in grads)
  ends = []
  for step in (1e-6, -1e-6):
    there = {key: leaf + step * ways[key] for key, leaf in params.items()}
    ends.append(oracle(there, 1, row + step * way, grad_out)[0] @ grad_out)
  np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, right, rtol=1e-6)


@network
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_past_the_sizes_are_exact_zeros_and_give_no_gradient(experts, name):
  graph, state = build(experts)
  rows, grad_out = draw()
  sizes, used = jnp.array([3, 2, 0, 4]), 9
  plain = run(graph, name, state, rows, sizes, grad_out)
  rows[used:], grad_out[used:] = 100 * rows[used:], 100 * grad_out[used:]
  dirty = run(graph, name, state, rows, sizes, grad_out)
  jax.tree.map(np.testing.assert_array_equal, plain, dirty)
  np.testing.assert_array_equal(plain[0][used:], 0)


@network
@backend
def test_a_permutation_of_an_experts_rows_permutes_outputs(experts, name):
  graph, state = build(experts)
  rows, grad_out = draw()
  sizes = jnp.array([R // E] * E)
  rng = np.random.default_rng(4)
  order = np.concatenate([first + rng.permutation(R // E) for first in range(0, R, R // E)])
  out, _, grad_rows = run(graph, name, state, rows, sizes, grad_out)
  moved, _, moved_rows = run(graph, name, state, rows[order], sizes, grad_out[order])
  np.testing.assert_array_equal(np.asarray(out)[order], moved)
  np.testing.assert_array_equal(np.asarray(grad_rows)[order], moved_rows)


@network
def test_it_is_the_same_without_jit_and_bfloat16_is_close_on_medians(experts):
  graph, state = build(experts)
  rows, grad_out = draw()
  sizes = jnp.array([7, 1, 3, 9])
  exact = run(graph, "blocks", state, rows, sizes, grad_out)[0]
  eager = nnx.merge(graph, state)(jnp.asarray(rows), groups_of("blocks", sizes))
  np.testing.assert_allclose(eager, exact, rtol=1e-6, atol=1e-6)
  rough, grads, _ = run(graph, "blocks", state, rows.astype(jnp.bfloat16), sizes, grad_out)
  assert rough.dtype == jnp.bfloat16
  assert {grad.dtype for grad in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
  assert np.median(np.abs(np.asarray(rough, np.float32) - exact)) < 2e-2


@network
def test_the_stated_number_of_parameters_is_what_an_expert_has(experts):
  _, state = build(experts)
  numbers = experts.expert_params(D, E)
  assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sum(numbers) and len(numbers) == E
