"""Frozen entries keep every bit of weight and moments, and the rest moves as if they were not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.optim import OPTIMIZERS, Constant, Optim, freeze, frozen_masks, hold, make_optimizer

SPLITS = ((1, 3), (1, 1))  # three layers in one leaf, and one by itself
DIMS = {
  "attention": {"q": ("embed", "heads", "head")},
  "moe": {
    "router": {"gate": {"weight": ("embed", "expert")}},
    "experts": {"down": ("expert", "mlp", "embed")},
  },
}
SIZES = {"embed": 4, "heads": 2, "head": 3, "expert": 4, "mlp": 6, "vocab": 7}
PATTERNS = ("layers/1/attention/*", "*/experts/*@0:2", "layers/3/moe/router/*", "embed/*")


def of_dims(function):
  lead = (3,), (1,)
  return {
    "embed": {"table": function((), ("vocab", "embed"))},
    "stack": {
      str(s): {"0": jax.tree.map(
        lambda dims, size=size: function(size, dims), DIMS,
        is_leaf=lambda node: isinstance(node, tuple),
      )}
      for s, size in enumerate(lead)
    },
  }  # fmt: skip


ALL_DIMS = of_dims(lambda lead, dims: ("layer", *dims) if lead else dims)


def draw(seed):
  rng = np.random.default_rng(seed)
  shape = lambda lead, dims: (*lead, *(SIZES[dim] for dim in dims))  # noqa: E731
  return of_dims(lambda lead, dims: jnp.asarray(rng.normal(size=shape(lead, dims)), jnp.float32))


def transform_of(name):
  paths = {path: param_names.canonical_name(path, SPLITS) for path in param_names.flatten(draw(0))}
  optim = Optim(OPTIMIZERS[name][1], Constant(), learning_rate=0.1, no_decay=())
  return make_optimizer(optim, 20, param_names.unflatten(draw(0), paths), ALL_DIMS)


def is_frozen(name):
  """Returns where an entry of a leaf is frozen, written out by hand."""
  if name == "embed/table" or name.startswith("layers/1/attention"):
    return True
  if name.startswith("layers/3/moe/router"):
    return True
  return np.array([1, 1, 0, 0], bool) if "/experts/" in name else False


def along(frozen, x):
  """Returns the mask over a leaf whose first dim is that of experts, or over all of it."""
  shape = (-1, *[1] * (x.ndim - 1)) if np.ndim(frozen) and x.ndim else ()
  return np.broadcast_to(np.reshape(frozen, shape) if shape else np.all(frozen), x.shape)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def steps(request):
  """Returns parameters and state before and after a frozen step, and its updates beside others."""
  inner = transform_of(request.param)
  masks = frozen_masks(PATTERNS, draw(0), ALL_DIMS, SPLITS)
  frozen = freeze(inner, masks)
  params, state = draw(0), frozen.init(draw(0))
  updates, state = jax.jit(inner.update)(draw(1), state, params)
  params = optax.apply_updates(params, updates)
  grad = draw(2)
  still = param_names.unstack(param_names.flatten(grad), SPLITS)
  still = {name: jnp.where(along(is_frozen(name), x), 0, x) for name, x in still.items()}
  grad_0 = param_names.unflatten(
    grad, param_names.stack(still, list(param_names.flatten(grad)), SPLITS)
  )
  right, _ = jax.jit(inner.update)(grad_0, state, params)
  got, after = jax.jit(frozen.update)(grad, state, params)
  moved = optax.apply_updates(params, got)
  trees = (params, moved, state, after, right, got)
  return [
    {
      name: np.asarray(x)
      for name, x in param_names.unstack(param_names.flatten(tree), SPLITS).items()
    }
    for tree in trees
  ]


def test_frozen_weights_keep_every_bit_and_free_ones_move(steps):
  params, moved, *_ = steps
  for name, x in params.items():
    frozen = along(is_frozen(name), x)
    np.testing.assert_array_equal(moved[name][frozen], x[frozen], err_msg=name)
    still = (moved[name] == x) & ~frozen
    assert still.sum() <= 0.1 * (~frozen).sum(), name


def test_free_weights_move_as_if_the_frozen_had_no_gradient(steps):
  *_, right, got = steps
  for name, x in right.items():
    free = ~along(is_frozen(name), x)
    np.testing.assert_allclose(got[name][free], x[free], rtol=1e-5, atol=1e-7, err_msg=name)


def test_moments_of_the_frozen_are_not_touched_and_others_are(steps):
  _, _, state, after, *_ = steps
  assert state.keys() == after.keys()
  touched = 0
  for path, x in state.items():
    tail = next((path[at:] for at in (path.find("layers/"), path.find("embed/")) if at >= 0), None)
    if tail is None:
      continue
    frozen = along(is_frozen(tail), x)
    np.testing.assert_array_equal(after[path][frozen], x[frozen], err_msg=path)
    touched += (after[path][~frozen] != x[~frozen]).sum()
  assert touched > 100


def test_what_moves_beside_the_optimizer_is_held_where_it_is_frozen():
  before, after = draw(0), draw(1)
  held = hold(frozen_masks(PATTERNS, before, ALL_DIMS, SPLITS), before, after)
  old, new, got = (
    param_names.unstack(param_names.flatten(tree), SPLITS) for tree in (before, after, held)
  )
  for name, x in got.items():
    frozen = along(is_frozen(name), x)
    np.testing.assert_array_equal(x, np.where(frozen, old[name], new[name]), err_msg=name)


def test_no_pattern_leaves_the_transform_itself():
  inner = transform_of("adamw")
  assert freeze(inner, frozen_masks((), draw(0), ALL_DIMS, SPLITS)) is inner


def test_a_range_leaves_alone_what_has_no_experts_among_what_the_glob_names():
  masks = frozen_masks(("layers/*@0:2",), draw(0), ALL_DIMS, SPLITS)
  moe = frozen_masks(("*/moe/*@0:2",), draw(0), ALL_DIMS, SPLITS)
  assert masks.keys() == moe.keys() and len(masks) == 4  # two leaves of each segment, no attention
  for path, mask in masks.items():
    np.testing.assert_array_equal(mask, moe[path])
    np.testing.assert_array_equal(mask[0].ravel(), [True, True, False, False])


@pytest.mark.parametrize(
  "pattern, why",
  [
    ("layers/9/*", "names no parameter; one is 'embed/table'"),
    ("*/attention/q@0:1", "names no leaf with experts"),
    ("*/experts/*@2:5", "experts that a leaf of shape"),
    ("*/experts/*@2:2", "experts that a leaf of shape"),
  ],
)
def test_a_pattern_that_names_nothing_is_refused(pattern, why):
  with pytest.raises(InputError, match=why):
    frozen_masks((pattern,), draw(0), ALL_DIMS, SPLITS)


def test_an_average_over_frozen_and_free_experts_moves_and_frozen_columns_do_not():
  frozen = freeze(
    transform_of("adafactor"), frozen_masks(("*/gate/weight@1:3",), draw(0), ALL_DIMS, SPLITS)
  )
  state = frozen.init(draw(0))
  updates, after = jax.jit(frozen.update)(draw(1), state, draw(0))
  gate = param_names.flatten(updates)["stack/0/0/moe/router/gate/weight"]
  np.testing.assert_array_equal(np.any(gate != 0, axis=(0, 1)), [True, False, False, True])
  old, new = param_names.flatten(state), param_names.flatten(after)
  averages = [path for path in old if "gate/weight" in path and old[path].shape == (3, 4)]
  assert len(averages) == 2
  # Columns and rows are of one size here, so that nobody can tell which average is over which.
  assert all(bool(np.all(new[path] != old[path])) for path in averages)
