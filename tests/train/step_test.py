import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.core.metrics import Mean
from jaxmoe.core.rng import Keys
from jaxmoe.optim import AdamW, Constant, Cosine, Optim, guarded, make_optimizer, make_schedule
from jaxmoe.train.gradients import make_gradients
from jaxmoe.train.step import TrainStep, is_spike, remember
from jaxmoe.train.train_state import SpikeWindow, State

RARE = 18  # an id that only the bad batch holds
ROWS = ((12,), (7, 5))
NO_LOSS = Mean(jnp.float32(0), jnp.float32(1))  # of one label


@pytest.fixture(scope="module")
def training(decoder_of, params_of):
  """Returns a function (scan) -> (initial state, compiled step); the rare id's row is infinite."""
  made = {}

  def get(scan=True):
    if scan not in made:
      decoder = decoder_of(scan=scan)
      optim = Optim(AdamW(), Cosine(warmup_steps=2), learning_rate=1e-2)
      transform = make_optimizer(optim, 9, decoder.parameter_names, decoder.dims)
      step = TrainStep(make_gradients(decoder, 1), transform, make_schedule(optim, 9), 0)
      params = params_of(decoder)
      params["embed"]["table"] = params["embed"]["table"].at[RARE].set(jnp.inf)
      state = State.create(params, transform.init(params))
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


@pytest.fixture(scope="module")
def nothing(good):
  return {**good[0], "labels": np.full_like(good[0]["labels"], -1)}


def test_a_batch_without_a_label_moves_nothing_but_the_counts(training, good, bad, nothing):
  state, step = training()
  before = jax.device_get(state)
  bad = {**bad, "labels": nothing["labels"]}
  after, metrics = run(state, step, [nothing, bad])
  same = ("params", "optimizer", "skipped", "in_a_row", "recent")
  assert_same_bits(*([getattr(of, name) for name in same] for of in (after, before)))
  assert (after.step, after.unlabelled) == (2, 2)
  assert [int(of_step["unlabelled"]) for of_step in metrics] == [1, 2]
  assert float(metrics[0]["loss"].weight) == 0


def test_one_label_makes_a_step(training, nothing):
  state, step = training()
  before = jax.device_get(state)
  labels = nothing["labels"].copy()
  labels[1, 9] = 3
  after, (metrics,) = run(state, step, [{**nothing, "labels": labels}])
  assert (after.step, after.unlabelled, float(metrics["loss"].weight)) == (1, 0, 1)
  assert np.any(after.params["head"]["weight"] != before.params["head"]["weight"])


def test_steps_around_one_without_labels_equal_the_run_without_it(training, good, bad, nothing):
  batches = [nothing, good[0], bad, nothing, good[1], nothing, good[2], good[3]]
  with_none, metrics = run(*training(), batches)
  without, right = run(*training(), good)
  assert_same_bits(
    *((of.params, of.optimizer, of.recent) for of in (with_none, without))
  )
  assert (with_none.step, with_none.skipped, with_none.unlabelled) == (8, 1, 3)
  left = [of_step for of_step, batch in zip(metrics, batches) if any(batch is g for g in good)]
  for name in ("loss", "grad_norm", "learning_rate"):
    assert_same_bits([m[name] for m in left], [m[name] for m in right])


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
    return grads, {"total_loss": total, "loss": NO_LOSS, "layers": {}}, {}

  transform = guarded(optax.adam(0.1))
  params = {"a": jnp.ones(()), "b": jnp.arange(5.0)}
  first = State.create(params, transform.init(params))
  state = dataclasses.replace(first, step=jnp.int32(4), skipped=jnp.int32(1))
  after, metrics = TrainStep(gradients, transform, lambda step: 0.1, 0)(state, {})
  assert_same_bits((after.params, after.optimizer), (state.params, state.optimizer))
  assert (after.step, after.skipped, bool(metrics["finite"])) == (5, 2, False)


def test_the_learning_rate_that_is_logged_is_the_one_applied_and_skips_do_not_move_it():
  optim = Optim(AdamW(), Cosine(warmup_steps=3), learning_rate=0.5)
  schedule = make_schedule(optim, 8)
  transform = guarded(optax.scale_by_learning_rate(schedule))

  def gradients(params, batch, keys):
    return {"x": batch["x"]}, {"total_loss": jnp.sum(batch["x"]), "loss": NO_LOSS, "layers": {}}, {}

  params = {"x": jnp.zeros(())}
  state = State.create(params, transform.init(params))
  step, rates = TrainStep(gradients, transform, schedule, 0), []
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
    metrics = {"total_loss": jnp.float32(0), "loss": NO_LOSS, "layers": {}}
    return {"x": jnp.array([3.0, 4.0])}, metrics, {}

  params = {"x": jnp.zeros(2)}
  state = State.create(params, transform.init(params))
  _, metrics = TrainStep(gradients, transform, make_schedule(optim, 3), 0)(state, {})
  np.testing.assert_allclose(metrics["grad_norm"], 5.0, rtol=1e-6)


def test_randomness_depends_on_the_seed_and_the_step_alone():
  def gradients(params, batch, keys):
    draw = jax.random.uniform(keys("x"))
    metrics = {"total_loss": jnp.float32(0), "loss": NO_LOSS, "layers": {}}
    return params, {**metrics, "draw": draw}, {}

  transform = guarded(optax.identity())

  def draw(seed, at):
    first = State.create({"x": jnp.ones(())}, transform.init({}))
    state = dataclasses.replace(first, step=jnp.int32(at))
    _, metrics = TrainStep(gradients, transform, lambda step: 0.0, seed)(state, {})
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
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_the_loss_falls_on_a_batch_seen_again(training, good):
  _, metrics = run(*training(), [good[0]] * 8)
  losses = [float(m["loss"].value) for m in metrics]
  assert losses[-1] < losses[0] - 0.1


def filled(losses, norms=None):
  values_2W = jnp.stack([jnp.float32(losses), jnp.float32(norms or [1.0] * len(losses))])
  return SpikeWindow(values_2W, jnp.int32(len(losses)))


@pytest.mark.parametrize("factor", [1.5, 6.0])
def test_a_spike_lies_above_mean_and_deviation_of_the_window(factor):
  losses = [2.0, 2.5, 1.5, 2.0]
  limit = np.mean(losses) + factor * np.std(losses)
  for loss, expected in ((limit - 1e-4, False), (limit + 1e-4, True), (0.0, False)):
    assert bool(is_spike(filled(losses), jnp.float32([loss, 1.0]), factor)) == expected
  norms = [1.0, 4.0, 1.0, 4.0]
  limit = 2.5 + factor * 1.5
  for norm, expected in ((limit - 1e-4, False), (limit + 1e-4, True)):
    assert bool(is_spike(filled(losses, norms), jnp.float32([2.0, norm]), factor)) == expected


def test_a_window_that_never_moved_allows_a_hundredth_of_its_mean_for_a_deviation():
  still = filled([5.0] * 4)
  assert not is_spike(still, jnp.float32([5.29, 1.0]), 6.0)
  assert is_spike(still, jnp.float32([5.31, 1.0]), 6.0)


def test_a_norm_that_never_moved_allows_half_of_it_for_a_deviation():
  still = filled([5.0] * 4)
  assert not is_spike(still, jnp.float32([5.0, 3.99]), 6.0)
  assert is_spike(still, jnp.float32([5.0, 4.01]), 6.0)


def test_nothing_is_a_spike_before_the_window_is_full_or_without_one():
  recent = SpikeWindow(jnp.zeros((2, 3)), jnp.int32(0))
  for n in range(3):
    assert not is_spike(recent, jnp.float32([1e9, 1e9]), 6.0)
    recent = remember(recent, jnp.float32([n, n]))
  assert is_spike(recent, jnp.float32([1e9, 0.0]), 6.0)
  none = SpikeWindow(jnp.zeros((2, 0)), jnp.int32(0))
  assert not is_spike(none, jnp.float32([1e9, 1e9]), 6.0)
  assert remember(none, jnp.zeros(2)) is none


def test_the_window_holds_the_last_ones():
  recent = SpikeWindow(jnp.zeros((2, 3)), jnp.int32(0))
  for n in range(8):
    recent = remember(recent, jnp.float32([n, -n]))
  assert sorted(recent.values_2W[0].tolist()) == [5, 6, 7]
  assert sorted(recent.values_2W[1].tolist()) == [-7, -6, -5]


def test_a_spike_moves_nothing_and_is_not_remembered():
  def gradients(params, batch, keys):
    loss = Mean(batch["loss"], jnp.float32(1))
    return {"x": jnp.float32(1)}, {"total_loss": batch["loss"], "loss": loss, "layers": {}}, {}

  transform = guarded(optax.sgd(0.1))
  step = TrainStep(gradients, transform, lambda step: 0.1, 0, spike_factor=3.0)
  state = State.create({"x": jnp.float32(0)}, transform.init({"x": jnp.float32(0)}), window=4)
  seen = []
  for loss in (2.0, 2.1, 1.9, 2.0, 9.0, 9.0, 2.0, np.nan, 2.0):
    state, metrics = step(state, {"loss": jnp.float32(loss)})
    seen.append((int(metrics["skipped"]), int(metrics["in_a_row"]), bool(metrics["finite"])))
  assert seen[3:] == [(0, 0, True), (1, 1, True), (2, 2, True), (2, 0, True), (3, 1, False),
                      (3, 0, True)]  # fmt: skip
  np.testing.assert_allclose(state.params["x"], -0.6, rtol=1e-6)
  assert int(state.recent.count) == 6 and float(state.recent.values_2W[0].max()) < 2.2


def test_steps_without_labels_between_skips_neither_end_nor_lengthen_their_row():
  def gradients(params, batch, keys):
    loss = Mean(batch["loss"] * batch["labels"], batch["labels"])
    return {"x": jnp.float32(1)}, {"total_loss": batch["loss"], "loss": loss, "layers": {}}, {}

  transform = guarded(optax.sgd(0.1))
  step = TrainStep(gradients, transform, lambda step: 0.1, 0, spike_factor=3.0)
  state = State.create({"x": jnp.float32(0)}, transform.init({"x": jnp.float32(0)}), window=4)
  rows, seen = ((2, 5), (9, 1), (5, 0), (np.nan, 0), (9, 2), (2, 0), (2, 3), (5, 0)), []
  for _ in range(4):
    state, _ = step(state, {"loss": jnp.float32(2), "labels": jnp.float32(3)})
  for loss, labels in rows:
    state, told = step(state, {"loss": jnp.float32(loss), "labels": jnp.float32(labels)})
    seen.append(tuple(int(told[name]) for name in ("skipped", "in_a_row", "unlabelled")))
  assert seen == [
    (0, 0, 0), (1, 1, 0), (1, 1, 1), (1, 1, 2), (2, 2, 2), (2, 2, 3), (2, 0, 3), (2, 0, 4)
  ]  # fmt: skip
  assert int(state.recent.count) == 6
