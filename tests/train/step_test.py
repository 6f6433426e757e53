import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.core.metrics import Mean
from jaxmoe.core.rng import Keys
from jaxmoe.optim import AdamW, Constant, Cosine, Optim, make_optimizer, make_schedule
from jaxmoe.train.gradients import make_gradients
from jaxmoe.train.state import State
from jaxmoe.train.step import make_step

RARE = 18  # an id that only the bad batch holds
ROWS = ((12,), (7, 5))


@pytest.fixture(scope="module")
def training(decoder_of, params_of):
  """Returns a function (scan) -> (initial state, compiled step); the rare id's row is infinite."""
  made = {}

  def get(scan=True):
    if scan not in made:
      decoder = decoder_of(scan=scan)
      optim = Optim(AdamW(), Cosine(warmup_steps=2), learning_rate=1e-2)
      transform = make_optimizer(optim, 9, decoder.parameter_names, decoder.dims)
      step = make_step(make_gradients(decoder, 1), transform, make_schedule(optim, 9), 0)
      params = params_of(decoder)
      params["embed"]["table"] = params["embed"]["table"].at[RARE].set(jnp.inf)
      state = State(jnp.int32(0), params, transform.init(params), jnp.int32(0))
      made[scan] = state, jax.jit(step, donate_argnums=0)
    state, step = made[scan]
    return jax.tree.map(jnp.copy, state), step

  return get


def run(state, step, batches):
  metrics = []
  for batch in batches:
    state, of_step = step(state, batch)
    metrics.append(jax.device_get(of_step))
  return jax.device_get(state), metrics


def assert_same_bits(left, right):
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert np.asarray(a).dtype == np.asarray(b).dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def good(batch_of):
  return [batch_of(ROWS, 12, seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def bad(good):
  ids = good[0]["ids"].copy()
  ids[1, 3] = RARE
  return {**good[0], "ids": ids}


def test_a_bad_batch_moves_nothing_but_the_counts(training, bad):
  state, step = training()
  before = jax.device_get(state)
  after, (metrics,) = run(state, step, [bad])
  assert_same_bits((after.params, after.optimizer), (before.params, before.optimizer))
  assert (after.step, after.skipped) == (1, 1)
  assert not metrics["finite"]
  assert metrics["skipped"] == 1


def test_good_steps_around_a_bad_one_equal_the_run_without_it_bit_for_bit(training, good, bad):
  with_bad, metrics = run(*training(), [good[0], good[1], bad, good[2], good[3]])
  without, right = run(*training(), good)
  assert [bool(of_step["finite"]) for of_step in metrics] == [True, True, False, True, True]
  assert_same_bits((with_bad.params, with_bad.optimizer), (without.params, without.optimizer))
  assert (with_bad.step, with_bad.skipped) == (5, 1)
  del metrics[2]
  for name in ("loss", "grad_norm", "learning_rate"):
    assert_same_bits([m[name] for m in metrics], [m[name] for m in right])


@pytest.mark.parametrize("fault", ["loss", "gradient", "one of many"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_or_a_gradient_that_is_not_finite_skips_by_itself(fault, value):
  def gradients(params, batch, keys):
    grads = jax.tree.map(jnp.ones_like, params)
    if fault == "gradient":
      grads["a"] = jnp.full_like(grads["a"], value)
    if fault == "one of many":
      grads["b"] = grads["b"].at[3].set(value)
    total = jnp.float32(value if fault == "loss" else 1)
    return grads, {"total_loss": total, "loss": Mean.zero()}

  transform = optax.adam(0.1)
  params = {"a": jnp.ones(()), "b": jnp.arange(5.0)}
  state = State(jnp.int32(4), params, transform.init(params), jnp.int32(1))
  after, metrics = make_step(gradients, transform, lambda step: 0.1, 0)(state, {})
  assert_same_bits((after.params, after.optimizer), (state.params, state.optimizer))
  assert (after.step, after.skipped, bool(metrics["finite"])) == (5, 2, False)


def test_the_learning_rate_that_is_logged_is_the_one_applied_and_skips_do_not_move_it():
  optim = Optim(AdamW(), Cosine(warmup_steps=3), learning_rate=0.5)
  schedule = make_schedule(optim, 8)
  transform = optax.scale_by_learning_rate(schedule)

  def gradients(params, batch, keys):
    return {"x": batch["x"]}, {"total_loss": jnp.sum(batch["x"])}

  params = {"x": jnp.zeros(())}
  state = State(jnp.int32(0), params, transform.init(params), jnp.int32(0))
  step, rates = make_step(gradients, transform, schedule, 0), []
  for x in (1.0, 1.0, np.nan, np.inf, 1.0, 1.0, 1.0):
    before = state.params["x"]
    state, metrics = step(state, {"x": jnp.float32(x)})
    rates.append(float(metrics["learning_rate"]))
    if np.isfinite(x):
      np.testing.assert_allclose(before - state.params["x"], rates[-1], rtol=1e-6)
  np.testing.assert_allclose(rates, [schedule(n) for n in (0, 1, 2, 2, 2, 3, 4)], rtol=1e-6)


def test_the_norm_that_is_logged_is_that_of_the_gradient_before_clipping():
  optim = Optim(AdamW(weight_decay=0.0), Constant(), learning_rate=0.1, clip_norm=1e-3)
  transform = make_optimizer(optim, 3, {"x": "x"}, {"x": ("embed",)})

  def gradients(params, batch, keys):
    return {"x": jnp.array([3.0, 4.0])}, {"total_loss": jnp.float32(0)}

  params = {"x": jnp.zeros(2)}
  state = State(jnp.int32(0), params, transform.init(params), jnp.int32(0))
  _, metrics = make_step(gradients, transform, make_schedule(optim, 3), 0)(state, {})
  np.testing.assert_allclose(metrics["grad_norm"], 5.0, rtol=1e-6)


def test_randomness_depends_on_the_seed_and_the_step_alone():
  def gradients(params, batch, keys):
    return params, {"total_loss": jnp.float32(0), "draw": jax.random.uniform(keys("x"))}

  transform = optax.identity()

  def draw(seed, at):
    state = State(jnp.int32(at), {"x": jnp.ones(())}, transform.init({}), jnp.int32(0))
    _, metrics = make_step(gradients, transform, lambda step: 0.0, seed)(state, {})
    return float(metrics["draw"])

  expected = jax.random.uniform((Keys.from_seed(3) / "forward").at(7)("x"))
  assert draw(3, 7) == expected
  assert len({draw(3, 7), draw(3, 8), draw(4, 7)}) == 3


def test_a_step_compiles_once_and_donates_its_state(training, good, bad):
  state, step = training()
  for batch in [*good, bad]:
    old = state
    state, _ = step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
  assert step._cache_size() == 1


def test_scan_and_unrolled_layers_train_alike(training, good):
  _, scanned = run(*training(scan=True), good)
  _, unrolled = run(*training(scan=False), good)
  for name in ("loss", "total_loss", "grad_norm"):
    values = [[jax.tree.leaves(m[name])[0] for m in metrics] for metrics in (scanned, unrolled)]
    np.testing.assert_allclose(*values, rtol=1e-6)


def test_the_loss_falls_on_a_batch_seen_again(training, good):
  _, metrics = run(*training(), [good[0]] * 8)
  losses = [float(m["loss"].value) for m in metrics]
  assert losses[-1] < losses[0] - 0.1
