"""How updates reach parameters: by chance alike on every layout, and what stands still is told."""


import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.core.metrics import Mean
from jaxmoe.models.stack import LayerGroup
from jaxmoe.optim import Constant, Cosine, Lion, Masters, Optim, make_optimizer
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.train.step import ParamUpdate, TrainStep
from jaxmoe.train.train_state import StateSpec
from jaxmoe.train.update_underflow import STEPS, UpdateUnderflow, count_unmoved, may_underflow

LAYOUTS = {
  "data": Parallel(data=8),
  "zero 1": Parallel(fsdp=4, zero=1),
  "zero 2": Parallel(fsdp=4, zero=2),
  "zero 3": Parallel(fsdp=4, zero=3),
  "all": Parallel(fsdp=2, expert=2, tensor=2, zero=3),
}


def two(block):
  return (LayerGroup((block,), 1), LayerGroup((block,), 1))


def drawn(spec):
  """Returns arrays of a first state, by their names alone."""
  arrays = {}
  for name, like in spec.abstract().items():
    rng = np.random.default_rng([*name.encode()])
    x = rng.normal(size=like.shape) if name.startswith("params/") else np.zeros(like.shape)
    arrays[name] = jax.device_put(x.astype(like.dtype), like.sharding)
  return arrays


@pytest.fixture(scope="module")
def stepped(decoder_of):
  """Returns a function (layout, stack) -> the parameters after a step by a known gradient."""
  optim = Optim(Lion(weight_decay=0.0), Constant(), learning_rate=2e-3, clip_norm=None)

  def gradients(params, batch, keys):
    loss = Mean(jnp.float32(1), jnp.float32(1))
    metrics = {"total_loss": jnp.float32(0), "loss": loss, "layers": {}}
    return jax.tree.map(lambda leaf: jnp.cos(9 * leaf.astype(jnp.float32)), params), metrics, {}

  def run(parallel=Parallel(), stack=None):  # noqa: B008
    decoder = decoder_of(stack=stack, vocab_size=16)
    transform = make_optimizer(optim, 9, decoder.parameter_names, decoder.dims)
    layout, masters = make_layout(parallel), Masters("bfloat16")
    spec = StateSpec(decoder, transform, layout, masters=masters)
    lies = layout.shardings("grads", decoder.dims, decoder.shapes)
    shards = lambda params: jax.lax.with_sharding_constraint(params, lies)  # noqa: E731
    moves = ParamUpdate(shards, masters, decoder.layer_groups)
    step = TrainStep(gradients, transform, lambda update: 0.0, 0, param_update=moves)
    step = jax.jit(step, out_shardings=(spec.shardings, layout.replicated))
    state, _ = step(spec.from_arrays(drawn(spec)), {})
    after = spec.to_arrays(state)
    return {name: np.asarray(x) for name, x in after.items() if name.startswith("params/")}, spec

  return run


@pytest.fixture(scope="module")
def alone(stepped):
  return stepped()


def test_some_bfloat16_masters_move_in_a_step_and_some_do_not(alone):
  after, spec = alone
  assert {x.dtype for x in after.values()} == {jnp.dtype(jnp.bfloat16)}
  before = drawn(spec)
  moved = np.concatenate([np.ravel(x != before[name]) for name, x in after.items()])
  assert 0.2 < np.mean(moved) < 0.8


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "all"]


@pytest.mark.parametrize("layout", ["all", *SLOW])
def test_bfloat16_masters_get_the_same_bits_on_every_layout(stepped, alone, layout):
  got, _ = stepped(LAYOUTS[layout])
  for name, x in alone[0].items():
    np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_bfloat16_masters_get_the_same_bits_however_layers_are_stacked(stepped, alone):
  got, _ = stepped(stack=lambda block: (LayerGroup((block,), 1), LayerGroup((block,), 1)))
  for name, x in alone[0].items():
    np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_float32_masters_are_moved_as_ever():
  params = {"a": jnp.arange(4.0)}
  moves, plain = (
    jax.make_jaxpr(apply)(params, params)
    for apply in (lambda p, u: ParamUpdate().apply(p, u, 0, jnp.int32(3)), optax.apply_updates)
  )
  assert str(moves) == str(plain)


def test_entries_with_an_update_that_did_not_move_are_counted():
  before = {"a": jnp.ones((3, 4)), "b": jnp.full(5, 2.0, jnp.bfloat16), "c": jnp.zeros(())}
  updates = {"a": jnp.zeros((3, 4)).at[0].set(1e-9).at[1].set(0.5), "b": jnp.full(5, 1e-3)}
  updates["c"] = jnp.float32(1e-9)
  found = count_unmoved(before, updates, optax.apply_updates(before, updates))
  assert (int(found["updated"]), int(found["unmoved"])) == (4 + 4 + 5 + 1, 4 + 5)


def test_nothing_is_counted_where_nothing_can_stand_still():
  assert not may_underflow(Optim(learning_rate=1e-6))
  assert may_underflow(Optim(learning_rate=1e-9))
  assert may_underflow(Optim(master_dtype="bfloat16"))


@pytest.mark.parametrize(
  ("unmoved", "num_steps", "told"),
  [(60, 100, 3 + STEPS), (50, 100, None), (60, 8, 8), (60, 3, None)],
)
def test_a_run_that_stands_still_after_warm_up_says_so_once(observers, unmoved, num_steps, told):
  optim = Optim(schedule=Cosine(warmup_steps=3), learning_rate=1e-9)
  look = UpdateUnderflow(optim, num_steps, observers)
  for step in range(1, num_steps + 1):
    counted = 0 if step == 5 else 100  # a step that was skipped
    count = unmoved * counted / 100 if step > 3 else counted
    look(step, {"unmoved": {"updated": np.float32(counted), "unmoved": np.float32(count)}})
  events = [
    {"event": "standstill", "step": told, "share": 0.6, "master_dtype": "float32",
     "learning_rate": 1e-9}
  ]  # fmt: skip
  assert observers.log.seen == (events if told else [])
  said = "60% of the updates since warm-up left their weight as it was, bit for bit: "
  assert [text.startswith(said) for text in observers.display.said] == [True] * bool(told)
