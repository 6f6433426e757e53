import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.backends import Devices, Need
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.moe.dispatch import DISPATCHERS
from jaxmoe.moe.dispatch.capacity import Limited
from jaxmoe.moe.dispatch.plan import Ragged, Uniform
from jaxmoe.moe.experts import EXPERTS, NETWORKS, SwiGLU
from jaxmoe.moe.experts.clamped_swiglu import ClampedSwiGLU
from jaxmoe.moe.experts.mixed_primitives import Primitives
from jaxmoe.moe.experts.mlp import GELU
from jaxmoe.moe.experts.null import Null
from jaxmoe.moe.experts.zero_copy_constant import ZeroCopyConstant
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routing import Routing
from jaxmoe.ops.grouped_matmul import BACKENDS
from tests.contracts.oracles import experts as oracles

D, E, R = 6, 4, 20
network = pytest.mark.parametrize(
  "experts", [instance for _, instance in NETWORKS.values()], ids=NETWORKS.keys()
)
HERE = [name for name, each in BACKENDS.items() if each.fits(Need(Devices("cpu"))) is None]
backend = pytest.mark.parametrize("name", ["uniform", *HERE])
SIZES = {
  "sizes that divide nothing": [7, 1, 3, 9],
  "no row for an expert": [12, 0, 8, 0],
  "all rows on one expert": [0, 20, 0, 0],
  "one row": [0, 0, 1, 0],
  "rows left over": [3, 2, 0, 4],
  "no rows": [0, 0, 0, 0],
}


def network_oracle(network, params, expert, row, grad_out):
  """down(f(up(x))) of one row, and the gradients of x, matrices and biases, in float64."""
  first = next(key for key in params if not key.startswith("down") and "bias" not in key)
  up = params[first][expert].reshape(D, -1, params["down"].shape[1])
  bias = {key: params[f"{key}_bias"][expert] for key in (first, "down") if f"{key}_bias" in params}
  pre = np.einsum("d,dgf->gf", row, up) + bias.get(first, 0)
  hidden, slope = oracles.ACTIVATIONS[type(network)](network, pre)
  grad_pre = slope * (params["down"][expert] @ grad_out)
  grads = {
    first: np.einsum("d,gf->dgf", row, grad_pre).reshape(params[first][expert].shape),
    "down": np.outer(hidden, grad_out),
  }
  grads |= {f"{key}_bias": {first: grad_pre, "down": grad_out}[key] for key in bias}
  out = hidden @ params["down"][expert] + bias.get("down", 0)
  return out, np.einsum("gf,dgf->d", grad_pre, up), grads


def build(experts, seed=0):
  return parts_of(experts.build(Init(Keys.from_seed(seed)), D, E))


def parts_of(module):
  """Returns the graph and the leaves of a module, biases away from zero so that they show."""

  def moved(path, leaf):
    rng = np.random.default_rng(len(str(path)))
    bias = str(getattr(path[-1], "key", "")).endswith("bias")
    return leaf + jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype) if bias else leaf

  state = nnx.to_pure_dict(nnx.state(module))
  return nnx.graphdef(module), jax.tree_util.tree_map_with_path(moved, state)


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
        experts, params, expert, rows[at], grad_out[at]
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
  rng, oracle = np.random.default_rng(3), functools.partial(network_oracle, experts)
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
@pytest.mark.parametrize("name", HERE)
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


# The whole layer: every family behind every dispatcher.
A, T = 2, 13
MEMBERS = {name: instance for name, (_, instance) in EXPERTS.items()}
MORE = {
  "zero keeps its weight": ZeroCopyConstant(SwiGLU(4), zero_gives_weight=False),
  "primitives, 8 bits": Primitives(4, ("int8", "shift", "shift", "identity")),
  "null, biases": Null(ClampedSwiGLU(4, limit=0.5), num_null=1),
  "no constant": ZeroCopyConstant(GELU(4), num_copy=2, num_constant=0),
}
FAMILIES = MEMBERS | MORE
family = pytest.mark.parametrize("name", FAMILIES)
CASES = ("random", "padding", "an expert without tokens", "all on the same", "one token", "none")


def layer_of(name, dispatch):
  """Returns the record, and (graph, state) of a layer that drops nothing."""
  record = DISPATCHERS[dispatch][1]
  if isinstance(record, Limited):
    record = dataclasses.replace(record, factor=100.0)
  config = MoEConfig(E, A, experts=FAMILIES[name], dispatch=record)
  module = config.build(Init(Keys.from_seed(0)), D)
  return config, *parts_of(module)


def choices(case, seed):
  """Returns the choices of T tokens, their scores and which of them count, (T, A) each."""
  rng = np.random.default_rng(seed)
  expert = np.argsort(rng.random((T, E)), axis=1)[:, :A]
  if case == "all on the same":
    expert[:] = [seed % E, (seed + 1) % E]
  valid = np.ones((T, A), bool)
  if case == "random":
    valid = rng.random((T, A)) < 0.8
  if case == "padding":
    valid &= rng.random((T, 1)) < 0.6
  if case == "an expert without tokens":
    valid &= expert != 0
  if case in ("one token", "none"):
    valid &= np.arange(T)[:, None] == (4 if case == "one token" else T)
  return expert, rng.uniform(0.1, 1, (T, A)), valid


# The code of one family behind one dispatcher runs six times: compiling it well does not pay.
@functools.partial(
  jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def run_layer(graph, state, x, scores_TA, expert_TA, valid_TA, grad_y):
  """Returns outputs, drops, and the gradients of the parameters, of x and of the scores."""

  def compute(state, x, scores_TA):
    total_T1 = jnp.sum(jnp.where(valid_TA, scores_TA, 0), axis=1, keepdims=True)
    weight_TA = scores_TA / jnp.where(total_T1 > 0, total_T1, 1)
    routing = Routing(expert_TA, weight_TA, valid_TA, jnp.ones((T, E)), jnp.zeros(T))
    layer = nnx.merge(graph, state)
    found, counts = layer._experts(x[None], routing, {}, Keys.from_seed(1))
    y = found.reduce(layer.parallel)[0]
    return y, sum(counts.dropped.values())

  y, vjp, dropped = jax.vjp(compute, state, x, scores_TA, has_aux=True)
  return y, dropped, *vjp(grad_y)


@pytest.mark.parametrize(
  "name, dispatch",
  [*((name, dispatch) for name in MEMBERS for dispatch in DISPATCHERS),
   *((name, "dropless") for name in MORE)],
)  # fmt: skip
def test_a_layer_equals_the_float64_loop_in_values_and_slopes(name, dispatch):
  """A slope is the change of outputs along one random direction for each leaf."""
  config, graph, state = layer_of(name, dispatch)
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state)["experts"]
  params = oracles.seen(config.experts, params)
  for seed, case in enumerate(CASES):
    rng = np.random.default_rng(seed)
    x, grad_y = rng.normal(size=(2, T, D)).astype(np.float32).astype(np.float64)
    expert, scores, valid = choices(case, seed)
    f32 = jnp.float32
    y, dropped, grads, *of_inputs = run_layer(
      graph, state, f32(x), f32(scores), jnp.int32(expert), valid, f32(grad_y)
    )
    run_oracle = functools.partial(oracles.layer, config.experts, E, expert, valid)
    right = run_oracle(params, x, scores)
    np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-5, err_msg=case)
    assert dropped == 0
    leaves, tree = jax.tree.flatten((params, x, scores))
    got = jax.tree.leaves((grads["experts"], of_inputs))
    for at, (leaf, grad) in enumerate(zip(leaves, got, strict=True)):
      way, ends = rng.normal(size=leaf.shape), []
      for step in (1e-5, -1e-5):
        moved = jax.tree.unflatten(tree, [*leaves[:at], leaf + step * way, *leaves[at + 1 :]])
        ends.append(np.sum(grad_y * run_oracle(*moved)))
      slope = (ends[0] - ends[1]) / 2e-5
      # Float32 sums of up to 26 rows.
      np.testing.assert_allclose(np.sum(way * grad), slope, rtol=1e-4, atol=1e-4, err_msg=case)


@family
def test_the_stated_numbers_of_parameters_are_those_of_the_leaves(name):
  config, _, state = layer_of(name, "dropless")
  numbers = config.experts.expert_params(D, E)
  total = sum(leaf.size for leaf in jax.tree.leaves(state["experts"]))
  assert total == sum(numbers) + config.experts.shared_params(D) and len(numbers) == E
  gate = state["router"]["gate"]["weight"].size
  assert config.active_params(D) == gate + A * sum(numbers) // E + config.experts.shared_params(D)


@family
def test_exactly_the_experts_that_are_said_to_be_idle_take_no_rows(name):
  config, graph, state = layer_of(name, "dropless")
  module, num_zero_compute = nnx.merge(graph, state), config.experts.num_zero_compute(E)
  parts = [part for part in module.experts.groups(E) if part.takes_rows]
  assert [e for part in parts for e in range(part.start, part.stop)] == list(
    range(E - num_zero_compute)
  )
  for part in parts:
    context = module._context(part, None)
    assert (context.idle, context.others) == (
      num_zero_compute,
      E - num_zero_compute - (part.stop - part.start),
    )
