import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.expert_mlp import BACKENDS, fused
from jaxmoe.ops.expert_mlp.places import block_rows, place_choices, row_capacity

backend = pytest.mark.parametrize("layer", BACKENDS.values(), ids=BACKENDS.keys())
T, D, S, F, A = 70, 6, 4, 5, 2
NONE = S


def swiglu(pre):
  return jax.nn.silu(pre[..., 0, :]) * pre[..., 1, :]


def squared_relu(pre):
  return jnp.square(jax.nn.relu(pre[..., 0, :]))


def swiglu_64(pre):
  """Returns float64 (activation, its derivative by pre)."""
  gate, up = pre
  sigmoid = 1 / (1 + np.exp(-gate))
  by_gate = up * sigmoid * (1 + gate * (1 - sigmoid))
  return gate * sigmoid * up, np.stack([by_gate, gate * sigmoid])


def squared_relu_64(pre):
  positive = np.maximum(pre, 0)
  return positive[0] ** 2, 2 * positive


ACTIVATIONS = {2: (swiglu, swiglu_64), 1: (squared_relu, squared_relu_64)}


def slots(case):
  rng = np.random.default_rng(5)
  spread = np.argsort(rng.random((T, S)), axis=1)[:, :A]
  return {
    "spread": spread,
    "all on one slot": np.full((T, A), 2),
    "two slots take all": np.tile([3, 0], (T, 1)),
    "no rows at all": np.full((T, A), NONE),
    "one row": np.where(np.arange(T * A).reshape(T, A) == 77, 1, NONE),
    "some choices without a row": np.where(rng.random((T, A)) < 0.4, NONE, spread),
    "a slot without rows": np.where(spread == 1, 3, spread),
  }[case]


CASES = [
  "spread",
  "all on one slot",
  "two slots take all",
  "no rows at all",
  "one row",
  "some choices without a row",
  "a slot without rows",
]


def inputs(gates=2, num_slots=S, num_tokens=T, num_active=A, seed=0):
  rng = np.random.default_rng(seed)
  shapes = (num_tokens, D), (num_slots, D, gates, F), (num_slots, F, D), (num_tokens, num_active)
  return [rng.normal(size=shape) for shape in shapes]


def oracle(x, gate_up, down, weight, slot_TA, grad_y, activation):
  """Returns float64 y and the gradients of the four inputs, one choice at a time."""
  y, grads = np.zeros_like(x), [np.zeros_like(a) for a in (x, gate_up, down, weight)]
  for (t, a), slot in np.ndenumerate(slot_TA):
    if slot < gate_up.shape[0]:
      hidden, slope = activation(np.einsum("d,dgf->gf", x[t], gate_up[slot]))
      out = hidden @ down[slot]
      y[t] += weight[t, a] * out
      grad_pre = slope * (weight[t, a] * down[slot] @ grad_y[t])
      grads[0][t] += np.einsum("gf,dgf->d", grad_pre, gate_up[slot])
      grads[1][slot] += np.einsum("d,gf->dgf", x[t], grad_pre)
      grads[2][slot] += weight[t, a] * np.outer(hidden, grad_y[t])
      grads[3][t, a] = grad_y[t] @ out
  return y, *grads


@functools.cache
def compiled(layer, activation):
  """Returns a jitted function to y and the gradients of x, gate_up, down and weight."""

  @jax.jit
  def run(x, gate_up, down, weight, slot_TA, grad_y):
    def out(x, gate_up, down, weight):
      return layer(x, gate_up, down, slot_TA, weight, activation)

    y, vjp = jax.vjp(out, x, gate_up, down, weight)
    return y, *vjp(grad_y)

  return run


def run_both(layer, arrays, slot_TA, dtype=jnp.float32):
  activation, activation_64 = ACTIVATIONS[arrays[1].shape[2]]
  grad_y = np.random.default_rng(9).normal(size=arrays[0].shape)
  cast = [jnp.asarray(x, dtype) for x in (*arrays, grad_y)]
  got = compiled(layer, activation)(*cast[:4], jnp.asarray(slot_TA, jnp.int32), cast[4])
  return got, oracle(*arrays, slot_TA, grad_y, activation_64)


@backend
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gates", [2, 1])
def test_values_and_gradients_equal_the_float64_loop(layer, case, gates):
  got, expected = run_both(layer, inputs(gates), slots(case))
  for one, right in zip(got, expected, strict=True):
    # One float32 sum holds up to 140 products of size 10; its error scales with the largest.
    np.testing.assert_allclose(one, right, rtol=1e-5, atol=2e-6 * max(1, np.abs(right).max()))


@backend
@pytest.mark.parametrize(
  "shape", [(1, 1, 1), (3, 1, 1), (37, 1, 3), (5, 40, 3)], ids=["T1S1A1", "S1", "S1A3", "S40A3"]
)
def test_odd_shapes_equal_the_float64_loop(layer, shape):
  num_tokens, num_slots, num_active = shape
  arrays = inputs(2, num_slots, num_tokens, num_active)
  slot_TA = np.random.default_rng(1).integers(0, num_slots + 1, (num_tokens, num_active))
  got, expected = run_both(layer, arrays, slot_TA)
  for one, right in zip(got, expected, strict=True):
    np.testing.assert_allclose(one, right, rtol=1e-5, atol=2e-6 * max(1, np.abs(right).max()))


@backend
def test_a_choice_without_a_row_contributes_nothing_whatever_its_weight(layer):
  arrays = inputs()
  slot_TA = slots("some choices without a row")
  plain, _ = run_both(layer, arrays, slot_TA)
  arrays[3][slot_TA == NONE] = np.nan
  dirty, _ = run_both(layer, arrays, slot_TA)
  for one, other in zip(plain, dirty, strict=True):
    np.testing.assert_array_equal(one, other)
  np.testing.assert_array_equal(plain[4][slot_TA == NONE], 0.0)
  nowhere = np.all(slot_TA == NONE, axis=1)
  assert nowhere.any()
  np.testing.assert_array_equal(plain[0][nowhere], 0.0)
  np.testing.assert_array_equal(plain[1][nowhere], 0.0)


@backend
@pytest.mark.parametrize("case", ["spread", "all on one slot"])
def test_bfloat16_keeps_its_type_and_a_small_error(layer, case):
  got, expected = run_both(layer, inputs(), slots(case), jnp.bfloat16)
  for one, right in zip(got, expected, strict=True):
    assert one.dtype == jnp.bfloat16
    error = np.abs(np.asarray(one, np.float64) - right)
    assert np.median(error) <= 2e-2 * max(1, np.median(np.abs(right)))


def test_other_tokens_never_change_a_row_bit_for_bit():
  x, gate_up, down, weight = (a.astype(np.float32) for a in inputs(num_active=3))
  run = jax.jit(lambda x, slot_TA: fused(x, gate_up, down, slot_TA, weight, swiglu))
  rng = np.random.default_rng(2)
  crossed = 0
  for trial in range(40):
    # Half of the trials crowd slot 0 enough to overflow.
    crowd = np.where(rng.random((T, 3)) < (trial % 2) * 0.8, 0, rng.integers(0, S + 1, (T, 3)))
    token = rng.integers(0, T)
    changed = crowd.copy()
    others = np.arange(T) > token if trial % 4 < 2 else np.arange(T) != token
    changed[others] = rng.integers(0, S + 1, (others.sum(), 3))
    other_x = np.where(others[:, None], rng.normal(size=x.shape), x).astype(np.float32)
    before, after = run(x, crowd.astype(np.int32)), run(other_x, changed.astype(np.int32))
    np.testing.assert_array_equal(np.asarray(before)[~others], np.asarray(after)[~others])
    crossed += (np.bincount(crowd.ravel())[0] > row_capacity(3 * T, S)) and trial % 4 == 3
  assert crossed > 5


@pytest.mark.parametrize("capacity", [row_capacity(T * A, S), 0])
def test_every_choice_gets_one_row_of_its_slot_in_token_order(capacity):
  rng = np.random.default_rng(3)
  place = jax.jit(lambda slot_TA: place_choices(slot_TA, S, capacity))
  for skew in (0.0, 0.5, 1.0):
    slot_TA = rng.integers(0, S + 1, (T, A))
    slot_TA[rng.random((T, A)) < skew] = 1
    places = jax.tree.map(np.asarray, place(slot_TA.astype(np.int32)))
    row = places.row_TA.ravel()
    used = slot_TA.ravel() < S
    assert len(set(row[used])) == used.sum()
    assert np.all(row[~used] == places.choice_R.size)
    np.testing.assert_array_equal(places.choice_R[row[used]], np.flatnonzero(used))
    for slot in range(S):
      rows = row[slot_TA.ravel() == slot]
      own, over = rows[:capacity], rows[capacity:]
      np.testing.assert_array_equal(own, slot * capacity + np.arange(own.size))
      blocks = (over - S * capacity) // block_rows(capacity)
      assert np.all(places.block_slot_K[blocks] == slot)
      assert np.all(blocks < places.num_blocks)


def test_balanced_routing_computes_no_overflow():
  slot_TA = jnp.asarray(np.arange(T * A).reshape(T, A) % S, jnp.int32)
  place = jax.jit(lambda slot_TA: place_choices(slot_TA, S, row_capacity(T * A, S)))
  assert place(slot_TA).num_blocks == 0


def test_slots_own_no_rows_where_choices_spread_over_more_and_outputs_stay():
  """Sixteen slots of which 4 hold experts: all products are in the loop over live blocks."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(T * 16, D)).astype(np.float32)
  gate_up, down = rng.normal(size=(S, D, 2, F)), rng.normal(size=(S, F, D))
  first, second = jnp.float32(gate_up), jnp.float32(down)

  @functools.partial(jax.jit, static_argnums=4)
  def run(x, first, second, slot_TA, among):
    weight_TA = jnp.linspace(0.5, 1.0, slot_TA.size).reshape(slot_TA.shape)
    layer = lambda *args: jnp.sum(  # noqa: E731
      fused(*args[:3], slot_TA, args[3], swiglu, among) ** 2
    )
    return jax.value_and_grad(layer, (0, 1, 2, 3))(x, first, second, weight_TA)

  spread = np.argsort(rng.random((T * 16, 16)), axis=1)[:, :A]
  for slot_TA in (np.minimum(spread, NONE), np.full(spread.shape, 1), np.full(spread.shape, NONE)):
    whole, lean = (run(x, first, second, slot_TA, among) for among in (None, 16))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(lean), strict=True):
      # Sums over up to 2,240 rows in another order.
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * np.abs(one).max())
  flops = [
    run.lower(x, first, second, slot_TA, among).compile().cost_analysis()["flops"]
    for among in (None, 16)
  ]
  assert flops[1] < 0.5 * flops[0]


def test_without_rows_of_their_own_slots_have_as_many_blocks_as_their_rows_need():
  rng = np.random.default_rng(0)
  place = jax.jit(lambda slot_TA: place_choices(slot_TA, S, 0))
  for share in (0.0, 0.3, 1.0):
    slot_TA = np.where(rng.random((T, A)) < share, rng.integers(0, S, (T, A)), NONE)
    sizes = np.bincount(slot_TA.ravel(), minlength=S + 1)[:S]
    assert place(slot_TA.astype(np.int32)).num_blocks == np.ceil(sizes / block_rows(0)).sum()


@pytest.mark.slow
def test_the_time_is_that_of_the_live_rows_within_a_fifth():
  """Half of the slots hold experts; 1, 1/2 and 1/4 of the choices have a row, in turn."""
  num_tokens, dim, num_slots, shares = 4096, 256, 8, (1.0, 0.5, 0.25)
  rng = np.random.default_rng(0)
  shapes = (num_tokens, dim), (num_slots, dim, 2, dim), (num_slots, dim, dim), (num_tokens, A)
  arrays = [jnp.asarray(rng.normal(size=shape) / 16, jnp.float32) for shape in shapes]

  @jax.jit
  def run(slot_TA, x, gate_up, down, weight):
    layer = lambda *args: fused(*args[:3], slot_TA, args[3], swiglu, 2 * num_slots)  # noqa: E731
    y, vjp = jax.vjp(layer, x, gate_up, down, weight)
    return y, vjp(y)

  spread = np.argsort(rng.random((num_tokens, num_slots)), axis=1)[:, :A]
  chosen = {
    share: jnp.asarray(np.where(rng.random(spread.shape) < share, spread, num_slots), jnp.int32)
    for share in shares
  }
  seconds = {share: [] for share in shares}
  for _ in range(16):  # The first round compiles.
    for share, slot_TA in chosen.items():
      start = time.perf_counter()
      jax.block_until_ready(run(slot_TA, *arrays))
      seconds[share].append(time.perf_counter() - start)
  per_row = {share: np.median(times[1:]) / share for share, times in seconds.items()}
  for share in shares[1:]:
    assert 0.8 < per_row[share] / per_row[1.0] < 1.2, per_row
