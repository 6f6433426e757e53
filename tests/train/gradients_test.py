"""Gradients against a decoder and its losses written out from the papers, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.rng import Keys
from jaxmoe.models.stack import LayerGroup
from jaxmoe.moe.balance import LoadBalance, RouterZ
from jaxmoe.moe.dispatch import Dense, Dropless
from jaxmoe.train.gradients import counts_first, make_gradients

MICRO, LENGTH = 4, 12
# Two rows a microbatch: half, one token, full and padding alone.
ROWS = ((9,), (4, 3), (1,), (), (12,), (7, 5), (), ())
GLOBAL = (LoadBalance(0.5, "global"), RouterZ(0.1))
MIXED = (
  LoadBalance(0.5, "global"),
  LoadBalance(0.3, "micro"),
  LoadBalance(0.2, "global_running"),
  RouterZ(0.1),
)
WEIGHTS = {term.name: term.weight for term in MIXED}
KEYS = Keys(jax.random.key(np.uint32(0)))


# ---- the oracle ----


def rms(x, scale, eps):
  mean = jnp.mean(x * x, axis=-1, keepdims=True)
  return jnp.einsum("...d,d->...d", x / jnp.sqrt(mean + eps), scale)


def rope(x, position, theta):
  half = x.shape[-1] // 2
  angle = jnp.einsum("bl,h->blh", position, theta ** (-2.0 * np.arange(half) / x.shape[-1]))
  sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
  first, second = x[..., :half], x[..., half:]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(x, weights, config, batch):
  q, k, v = (jnp.einsum("bld,dnh->blnh", x, weights[f"attention/{name}"]) for name in "qkv")
  q, k = (rope(heads, batch["position"] * 1.0, config.rope_theta) for heads in (q, k))
  k, v = (jnp.repeat(heads, config.num_heads // config.num_kv_heads, axis=2) for heads in (k, v))
  scores = jnp.einsum("blnh,bsnh->bnls", q, k) / np.sqrt(config.head_dim)
  segment = batch["segment"]
  sees = (segment[:, :, None] == segment[:, None, :]) & (segment > 0)[:, :, None]
  sees = (sees & np.tril(np.ones((LENGTH, LENGTH), bool))[None])[:, None]
  share = jax.nn.softmax(jnp.where(sees, scores, -1e30), axis=-1) * sees
  return jnp.einsum("bnls,bsnh,nhd->bld", share, v, weights["attention/o"])


def experts(x, weights, config):
  """Returns every expert's output times its weight, which is zero for those not chosen."""
  logits = jnp.einsum("bld,de->ble", x, weights["moe/router/gate/weight"])
  scores = jax.nn.softmax(logits, axis=-1)
  best = jnp.argsort(-scores, axis=-1)[..., : config.num_active]
  chosen = jax.nn.one_hot(best, config.num_experts, dtype=scores.dtype).sum(axis=-2)
  weight = scores * chosen / jnp.sum(scores * chosen, axis=-1, keepdims=True)
  gate, up = jnp.einsum("bld,edgf->gblef", x, weights["moe/experts/gate_up"])
  rows = jnp.einsum("blef,efd->bled", jax.nn.silu(gate) * up, weights["moe/experts/down"])
  log_z = jnp.log(jnp.exp(logits).sum(axis=-1))
  return jnp.einsum("bled,ble->bld", rows, weight), (chosen, scores, log_z)


def oracle_terms(decoder, params, batch):
  """Returns nll (B, L), and (chosen, scores, log z) of every layer, computed over all rows."""
  weights = param_names.unstack(param_names.flatten(params), decoder.layer_groups)
  config, routings = decoder.config, []
  x = weights["embed/table"][batch["ids"]]
  for depth in range(config.num_layers):
    layer = {
      name.removeprefix(f"layers/{depth}/"): leaf
      for name, leaf in weights.items()
      if name.startswith(f"layers/{depth}/")
    }
    block = config.stack[0].pattern[0]
    normed = rms(x, layer["attention_norm/scale"], config.norm_eps)
    x = x + attention(normed, layer, block.attention, batch)
    y, routing = experts(rms(x, layer["ffn_norm/scale"], config.norm_eps), layer, block.ffn)
    x = x + y
    routings.append(routing)
  logits = rms(x, weights["final_norm/scale"], config.norm_eps) @ weights["head/weight"]
  log_p = jax.nn.log_softmax(logits, axis=-1)
  nll = -jnp.take_along_axis(log_p, jnp.maximum(batch["labels"], 0)[..., None], axis=-1)[..., 0]
  return nll, routings


def mean_over(values, valid):
  """Returns the mean over tokens (B, L) that are valid; 0 if there is none."""
  mask = valid.reshape(valid.shape + (1,) * (values.ndim - 2))
  return jnp.sum(values * mask, axis=(0, 1)) / max(valid.sum(), 1)


def load_balance(f, p):
  """E sum_i f_i p_i, with f as it is given: a constant."""
  return p.shape[0] * jnp.sum(jax.lax.stop_gradient(f) * p)


def share(counts):
  return counts / jnp.maximum(counts.sum(), 1)


def value_of(value, other):
  """Returns a value with the gradient of another."""
  return other + jax.lax.stop_gradient(value - other)


def oracle_balance(routing, valid):
  """Returns the balance losses of one layer by name, from the definitions of the scopes."""
  chosen, scores, log_z = routing
  parts = np.split(np.arange(len(valid)), MICRO)
  counts = [jnp.sum(chosen[rows] * valid[rows][..., None], axis=(0, 1)) for rows in parts]
  means = [mean_over(scores[rows], valid[rows]) for rows in parts]
  sizes = [valid[rows].sum() / valid.sum() for rows in parts]
  so_far = [share(sum(counts[: part + 1])) for part in range(MICRO)]
  until = [rows[-1] + 1 for rows in parts]
  means_so_far = [mean_over(scores[:end], valid[:end]) for end in until]
  return {
    "load_balance_global": load_balance(share(sum(counts)), mean_over(scores, valid)),
    "load_balance_micro": sum(map(load_balance, map(share, counts), means)) / MICRO,
    "load_balance_global_running": sum(
      size * value_of(load_balance(f, mean), load_balance(f, p))
      for size, f, mean, p in zip(sizes, so_far, means_so_far, means)
    ),
    "router_z": mean_over(log_z**2, valid),
  }


def oracle_loss(decoder, batch, params, weights):
  """Returns the total loss, and (token loss, balance losses by name, routing of every layer)."""
  valid, scored = batch["segment"] > 0, batch["labels"] >= 0
  nll, routings = oracle_terms(decoder, params, batch)
  layers = [oracle_balance(routing, valid) for routing in routings]
  balance = {name: sum(layer[name] for layer in layers) for name in layers[0]}
  loss = jnp.sum(nll * scored) / max(scored.sum(), 1)
  total = loss + sum(weight * balance[name] for name, weight in weights.items())
  return total, (loss, balance, routings)


# ---- what is tested ----


@pytest.fixture(scope="module")
def batch(batch_of):
  return batch_of(ROWS, LENGTH)


@pytest.fixture(scope="module")
def oracle(decoder_of, params_of, batch):
  """Returns a function (weights by name, parameters) -> ((total, metrics), gradient) in float64."""
  decoder = decoder_of(balance=MIXED)
  function = jax.value_and_grad(functools.partial(oracle_loss, decoder, batch), has_aux=True)
  compiled, fresh = jax.jit(function), params_of(decoder)

  def at(weights, params=fresh):
    with jax.enable_x64(True):
      wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
      every = {name: jnp.float64(weights.get(name, 0)) for name in WEIGHTS}
      return jax.tree.map(np.asarray, compiled(wide, every))

  return at


@pytest.fixture(scope="module")
def run(decoder_of, params_of):
  """Returns a function (balance, num_micro, dispatch) -> (parameters, compiled gradients)."""
  made = {}

  def get(balance=MIXED, num_micro=MICRO, dispatch=Dropless()):  # noqa: B008
    key = (balance, num_micro, dispatch)
    if key not in made:
      decoder = decoder_of(balance=balance, dispatch=dispatch)
      gradients = make_gradients(decoder, num_micro)
      compiled = jax.jit(lambda params, batch: gradients(params, batch, KEYS))
      made[key] = params_of(decoder), compiled
    return made[key]

  return get


@pytest.fixture(scope="module")
def mixed(run, batch):
  """Gradients and metrics of all scopes at once."""
  params, gradients = run()
  return gradients(params, batch)


@pytest.fixture(scope="module")
def right(oracle):
  """(token loss, balance losses, routings) and the gradient, as the oracle has them."""
  (_, metrics), grads = oracle(WEIGHTS)
  return *metrics, grads


def assert_leaves_close(left, right, rtol, floor):
  """Asserts max |a - b| <= rtol max |b| + floor max |all| for each leaf, in the maximum norm."""
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(right))
  for (path, b), a in zip(param_names.flatten(right).items(), jax.tree.leaves(left), strict=True):
    error = np.abs(np.asarray(a) - b).max()
    assert error <= rtol * np.abs(b).max() + floor * largest, (path, error)


dispatches = pytest.mark.parametrize("dispatch", [Dropless(), Dense()], ids=["dropless", "dense"])
# float32 against float64 through two layers: a few hundred roundings of 6e-8.
ROUNDING = {"rtol": 3e-5, "floor": 1e-6}


@dispatches
def test_four_uneven_microbatches_equal_one_big_batch_under_global(run, batch, dispatch):
  params, accumulated = run(GLOBAL, MICRO, dispatch)
  grads, metrics, _ = accumulated(params, batch)
  whole_grads, whole, _ = run(GLOBAL, 1, dispatch)[1](params, batch)
  np.testing.assert_allclose(metrics["loss"].value, whole["loss"].value, rtol=1e-6)
  np.testing.assert_allclose(metrics["total_loss"], whole["total_loss"], rtol=1e-6)
  for name, value in whole["balance"].items():
    np.testing.assert_allclose(metrics["balance"][name], value, rtol=1e-6)
  assert_leaves_close(grads, whole_grads, rtol=1e-5, floor=1e-7)


@dispatches
def test_the_gradient_of_a_whole_batch_is_that_of_the_loss_in_the_papers(
  run, batch, oracle, dispatch
):
  params, gradients = run(GLOBAL, 1, dispatch)
  _, grads = oracle({term.name: term.weight for term in GLOBAL})
  assert_leaves_close(gradients(params, batch)[0], grads, **ROUNDING)


def test_gradients_of_all_scopes_together_are_those_of_their_definitions(mixed, right):
  assert_leaves_close(mixed[0], right[3], **ROUNDING)


def test_the_oracle_itself_has_the_gradient_of_finite_differences(run, oracle):
  """All but the running scope: an estimate has no function of which it would be the gradient."""
  params, _ = run()
  weights = {name: weight for name, weight in WEIGHTS.items() if "running" not in name}
  rng = np.random.default_rng(0)
  way = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

  def at(step):
    moved = jax.tree.map(lambda leaf, d: np.asarray(leaf, np.float64) + step * d, params, way)
    return oracle(weights, moved)[0][0]

  slope = (at(1e-6) - at(-1e-6)) / 2e-6
  pairs = zip(jax.tree.leaves(oracle(weights)[1]), jax.tree.leaves(way), strict=True)
  along = sum(np.vdot(a, b) for a, b in pairs)
  np.testing.assert_allclose(slope, along, rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_balance_loss_equals_its_definition_over_the_step(mixed, right, name):
  np.testing.assert_allclose(mixed[1]["balance"][name], right[1][name], rtol=2e-6)


def test_the_loss_is_the_mean_over_all_scored_labels_and_weights_multiply(mixed, right):
  loss, balance, _, _ = right
  np.testing.assert_allclose(mixed[1]["loss"].value, loss, rtol=1e-6)
  total = loss + sum(weight * balance[name] for name, weight in WEIGHTS.items())
  np.testing.assert_allclose(mixed[1]["total_loss"], total, rtol=1e-6)


def test_scopes_are_apart_by_half_a_percent_and_more_where_microbatches_differ(mixed):
  """If a scope silently became another one, the tolerances above could not hide it."""
  values = sorted(float(value) for name, value in mixed[1]["balance"].items() if "load" in name)
  assert len(values) == 3
  assert min(np.diff(values)) > 0.005 * values[0], values


def test_gates_of_the_scopes_get_gradients_that_differ_by_more_than_a_percent(oracle):
  gates = [oracle({name: 1e3})[1] for name in WEIGHTS if name.startswith("load")]
  gates = [param_names.flatten(grads)["stack/0/0/moe/router/gate/weight"] for grads in gates]
  for a, b in ((0, 1), (1, 2), (0, 2)):
    assert np.abs(gates[a] - gates[b]).max() > 1e-2 * np.abs(gates[b]).max()


def test_the_running_scope_logs_its_error(mixed, right):
  error = right[1]["load_balance_global_running"] - right[1]["load_balance_global"]
  assert abs(error) > 1e-2
  np.testing.assert_allclose(mixed[1]["load_balance_global_running_error"], error, atol=2e-6)


def test_the_running_error_is_logged_only_where_the_scope_is_used(run, batch):
  params, gradients = run(GLOBAL)
  assert not [name for name in gradients(params, batch)[1] if name.endswith("_error")]


def test_a_balance_loss_moves_the_gate_through_p_and_nothing_behind_the_last_router(oracle):
  """The oracle holds f still; that the code has its gradients is tested above."""
  terms = [
    param_names.flatten(oracle(weights)[1]) for weights in ({"load_balance_global": 1.0}, {})
  ]
  moved = {path: np.abs(leaf - terms[1][path]) for path, leaf in terms[0].items()}
  assert (moved["stack/0/0/moe/router/gate/weight"].max(axis=(1, 2)) > 1e-3).all()
  assert moved["head/weight"].max() == moved["final_norm/scale"].max() == 0
  assert moved["stack/0/0/moe/experts/down"][1].max() == 0


def test_sums_count_every_choice_of_every_valid_token_once(mixed, right, batch):
  valid = batch["segment"] > 0
  sums = mixed[1]["layers"]["0"]["0"].router
  assert mixed[1]["tokens"] == valid.sum()
  for layer, (chosen, scores, log_z) in enumerate(right[2]):
    np.testing.assert_array_equal(sums.counts_E[layer], chosen[valid].sum(axis=0))
    assert sums.counts_E[layer].sum() == 2 * valid.sum()
    assert sums.tokens[layer] == valid.sum()
    np.testing.assert_allclose(sums.scores_E[layer], scores[valid].sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(sums.log_z_squared[layer], (log_z[valid] ** 2).sum(), rtol=1e-5)


def test_a_step_without_any_label_has_loss_zero_and_a_finite_gradient(run, batch):
  params, gradients = run()
  grads, metrics, _ = gradients(params, {**batch, "labels": np.full_like(batch["labels"], -1)})
  assert metrics["loss"].value == 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  assert not np.any(grads["head"]["weight"])


def test_a_step_of_padding_alone_has_no_gradient(run, batch):
  params, gradients = run()
  empty = {name: np.zeros_like(array) for name, array in batch.items()}
  grads, metrics, _ = gradients(params, {**empty, "labels": empty["labels"] - 1})
  assert metrics["total_loss"] == 0
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


PASSES = (
  ("global", 0.5, 1, 1),
  ("global", 0.5, MICRO, 2),
  ("global", 0.0, MICRO, 1),
  ("micro", 0.5, MICRO, 1),
  ("global_running", 0.5, MICRO, 1),
)


@pytest.mark.parametrize("scope, weight, num_micro, passes", PASSES)
def test_only_exact_balance_under_accumulation_costs_a_second_forward_pass(
  decoder_of, batch, scope, weight, num_micro, passes
):
  decoder = decoder_of(
    stack=lambda block: (LayerGroup((block,), repeats=1),),
    balance=(RouterZ(0.1), LoadBalance(weight, scope)),
  )
  assert counts_first(decoder, num_micro) == (passes == 2)
  gradients = make_gradients(decoder, num_micro)
  traced = jax.make_jaxpr(lambda *arguments: gradients(*arguments, KEYS))(decoder.shapes, batch)
  assert _count(traced.jaxpr, "top_k") == passes


def test_the_metric_of_an_exact_scope_stays_exact_where_its_weight_is_zero(run, batch, right):
  params, gradients = run((LoadBalance(0.0, "global"), RouterZ(0.1)))
  _, metrics, _ = gradients(params, batch)
  loss, balance, _, _ = right
  exact = balance["load_balance_global"]
  np.testing.assert_allclose(metrics["balance"]["load_balance_global"], exact, rtol=2e-6)
  np.testing.assert_allclose(metrics["total_loss"], loss + 0.1 * balance["router_z"], rtol=1e-6)


def _count(jaxpr, primitive):
  """Returns how often a primitive stands in a program, bodies of loops and calls included."""
  inner = (
    getattr(value, "jaxpr", value)
    for equation in jaxpr.eqns
    for parameter in equation.params.values()
    for value in (parameter if isinstance(parameter, (list, tuple)) else [parameter])
  )
  return sum(equation.primitive.name == primitive for equation in jaxpr.eqns) + sum(
    _count(sub, primitive) for sub in inner if hasattr(sub, "eqns")
  )
