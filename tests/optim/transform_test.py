import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.optim import (
  Adafactor,
  AdamW,
  Constant,
  Cosine,
  Lion,
  Muon,
  Optim,
  decay_mask,
  make_optimizer,
  make_schedule,
)

NAMES = {"a": "layers/0/attention/q", "b": "layers/0/moe/experts/down"}
DIMS = {"a": ("embed", "mlp"), "b": ("mlp", "embed")}


def total_norm(tree):
  return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in tree.values()))


def momentum(optim, gradients):
  """Returns Lion's momentum after one step, which is the clipped gradient times 1 - b2."""
  transform = make_optimizer(optim, 10, NAMES, DIMS)
  _, state = transform.update(gradients, transform.init(gradients), gradients)
  return {name: np.asarray(leaf) / (1 - optim.optimizer.b2) for name, leaf in state[1].mu.items()}


def test_gradients_are_clipped_by_the_norm_of_all_of_them_together():
  random = np.random.default_rng(0)
  gradients = {name: random.normal(size=(3, 3)).astype(np.float32) for name in NAMES}
  norm = total_norm(gradients)
  lion = Lion(b2=0.5)
  clipped = momentum(Optim(lion, Constant(), clip_norm=0.5 * norm), gradients)
  for name, gradient in gradients.items():
    np.testing.assert_allclose(clipped[name], 0.5 * gradient, rtol=1e-5)
  for untouched in (2.0 * norm, None):
    same = momentum(Optim(lion, Constant(), clip_norm=untouched), gradients)
    for name, gradient in gradients.items():
      np.testing.assert_array_equal(same[name], gradient)


def test_decay_follows_the_names():
  names = {
    "embed": {"table": "embed/table"},
    "norm": "layers/0/attention_norm/scale",
    "q": "layers/0/attention/q",
    "q_bias": "layers/0/attention/q_bias",
    "down": "layers/11/moe/experts/down",
    "final": "final_norm/scale",
    "head": "head/kernel",
  }
  assert decay_mask(names, Optim().no_decay) == {
    "embed": {"table": False},
    "norm": False,
    "q": True,
    "q_bias": False,
    "down": True,
    "final": False,
    "head": True,
  }
  assert decay_mask(names, ("*/moe/*", "head/kernel"))["down"] is False
  assert decay_mask(names, ())["final"] is True


def test_the_transform_steps_by_the_rate_that_metrics_show():
  optim = Optim(Lion(weight_decay=0.0), Cosine(warmup_steps=2), learning_rate=0.5)
  transform, schedule = make_optimizer(optim, 6, NAMES, DIMS), make_schedule(optim, 6)
  params = {name: jnp.ones((2, 2)) for name in NAMES}
  state = transform.init(params)
  for step in range(6):
    updates, state = transform.update(params, state, params)
    np.testing.assert_allclose(updates["a"], np.full((2, 2), -schedule(step)), rtol=1e-6)


def test_a_schedule_that_does_not_fit_is_refused_before_anything_runs():
  with pytest.raises(InputError, match="warmup_steps=100"):
    make_optimizer(Optim(schedule=Cosine(warmup_steps=100)), 10, NAMES, DIMS)


def test_dims_that_do_not_fit_the_parameters_are_our_own_mistake():
  transform = make_optimizer(Optim(schedule=Constant()), 10, NAMES, DIMS)
  with pytest.raises(AssertionError, match="one name per dim"):
    transform.init({"a": jnp.ones(2), "b": jnp.ones((2, 2))})


@pytest.mark.parametrize(
  ("cls", "field"),
  [
    (Optim, {"learning_rate": 0.0}),
    (Optim, {"learning_rate": -1.0}),
    (Optim, {"clip_norm": 0.0}),
    (AdamW, {"b1": 1.0}),
    (AdamW, {"b2": -0.1}),
    (AdamW, {"eps": 0.0}),
    (AdamW, {"weight_decay": -0.1}),
    (Lion, {"b2": 1.5}),
    (Lion, {"weight_decay": -1.0}),
    (Adafactor, {"clip_rms": 0.0}),
    (Adafactor, {"decay_exponent": -0.8}),
    (Adafactor, {"min_dim_size_to_factor": 0}),
    (Adafactor, {"eps": 0.0}),
    (Adafactor, {"weight_decay": -0.1}),
    (Muon, {"beta": 1.0}),
    (Muon, {"iterations": 0}),
    (Muon, {"update_rms": 0.0}),
    (Muon, {"adam_b2": 1.0}),
    (Muon, {"weight_decay": -0.1}),
  ],
)
def test_a_field_out_of_range_is_refused_by_name(cls, field):
  with pytest.raises(InputError, match=next(iter(field))):
    cls(**field)
