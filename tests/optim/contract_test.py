"""What every member of OPTIMIZERS keeps to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.core import config_io
from jaxmoe.optim import OPTIMIZERS, SCHEDULES, Constant, Cosine, Optim, make_optimizer

EVERY = pytest.mark.parametrize("name", OPTIMIZERS)
NUM_LAYERS = 3
SIZES = {"layer": NUM_LAYERS, "embed": 4, "heads": 2, "head": 3, "expert": 5, "gate": 2, "mlp": 6}
SIZES["vocab"] = 7
LAYER = {
  "attention/q": ("embed", "heads", "head"),
  "attention/o": ("heads", "head", "embed"),
  "attention/q_bias": ("heads", "head"),
  "norm/scale": ("embed",),
  "moe/router": ("embed", "expert"),
  "moe/experts/gate_up": ("expert", "embed", "gate", "mlp"),
  "moe/experts/down": ("expert", "mlp", "embed"),
}
OUTSIDE = {"embed/table": ("vocab", "embed"), "final_norm/scale": ("embed",)}


def nested(flat):
  """Returns the nested dict of {path: leaf}."""
  tree = {}
  for path, leaf in flat.items():
    *folders, last = path.split("/")
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = leaf
  return tree


def flat(tree):
  """Returns {path: leaf} of a tree of any containers."""
  pairs = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def unstack(leaves):
  """LayerGroups every leaf whose path has stack/0/0 into its layers, as a checkpoint does."""
  split = {}
  for path, leaf in leaves.items():
    if "stack/0/0" not in path:
      split[path] = leaf
      continue
    assert leaf.shape[:1] == (NUM_LAYERS,), path
    for layer in range(NUM_LAYERS):
      split[path.replace("stack/0/0", f"layers/{layer}")] = leaf[layer]
  return split


STACKED_DIMS = {f"stack/0/0/{name}": ("layer", *dims) for name, dims in LAYER.items()} | OUTSIDE
STACKED_NAMES = {path: path.replace("stack/0/0", "layers/0") for path in STACKED_DIMS}
LAYER_DIMS = {
  f"layers/{layer}/{name}": dims for layer in range(NUM_LAYERS) for name, dims in LAYER.items()
} | OUTSIDE
LAYER_NAMES = {path: path for path in LAYER_DIMS}


def values(seed):
  """Returns random stacked leaves whose blocks differ in size by orders of magnitude."""
  random = np.random.default_rng(seed)
  leaves = {}
  for path, dims in STACKED_DIMS.items():
    size = 10.0 ** np.arange(-1, 2).reshape(3, *(1,) * (len(dims) - 1)) if "stack" in path else 1.0
    leaf = random.normal(size=tuple(SIZES[dim] for dim in dims)) * size
    leaves[path] = jnp.asarray(leaf, jnp.float32)
  return leaves


def stacked_transform(name, **fields):
  optim = Optim(OPTIMIZERS[name][1], **{"schedule": Constant(), "learning_rate": 0.1} | fields)
  return make_optimizer(optim, 20, nested(STACKED_NAMES), nested(STACKED_DIMS))


@EVERY
def test_stacked_layers_train_as_layers_of_their_own(name):
  optim = Optim(OPTIMIZERS[name][1], Cosine(warmup_steps=1), learning_rate=0.1)
  stacked = stacked_transform(name, schedule=optim.schedule)
  single = make_optimizer(optim, 20, nested(LAYER_NAMES), nested(LAYER_DIMS))
  params = values(0)
  layers = unstack(params)
  state, layer_state = stacked.init(nested(params)), single.init(nested(layers))
  update, layer_update = jax.jit(stacked.update), jax.jit(single.update)
  for step in range(4):
    gradients = values(step + 1)
    updates, state = update(nested(gradients), state, nested(params))
    layer_updates, layer_state = layer_update(
      nested(unstack(gradients)), layer_state, nested(layers)
    )
    params = flat(optax.apply_updates(nested(params), updates))
    layers = flat(optax.apply_updates(nested(layers), layer_updates))
    for got, want in (
      (unstack(flat(updates)), flat(layer_updates)),
      (unstack(flat(state)), flat(layer_state)),
    ):
      assert got.keys() == want.keys()
      for path, leaf in want.items():
        # Muon's iterations multiply what rounding differs in.
        np.testing.assert_allclose(got[path], leaf, rtol=1e-5, atol=4e-6, err_msg=path)


@EVERY
def test_parts_of_the_leaves_move_as_the_whole_does_with_the_norm_of_the_whole(name):
  """Bit for bit, operation by operation: what a compiler fuses may round otherwise."""
  optim = Optim(OPTIMIZERS[name][1], Constant(), learning_rate=0.1, clip_norm=0.5)
  paths = list(STACKED_DIMS)

  def run(mine):
    tree = lambda leaves: nested({path: leaves[path] for path in mine})  # noqa: E731
    transform = make_optimizer(optim, 20, tree(STACKED_NAMES), tree(STACKED_DIMS))
    params, found = tree(values(0)), []
    state = transform.init(params)
    for step in range(3):
      gradients = values(step + 1)
      norm = {} if mine == paths else {"norm": optax.tree.norm(nested(gradients))}
      updates, state = transform.update(tree(gradients), state, params, **norm)
      params = optax.apply_updates(params, updates)
      found.append({**flat(updates), **flat(state)})
    return found

  whole = run(paths)
  for mine in (paths[::2], paths[1::2]):
    for part, right in zip(run(mine), whole, strict=True):
      assert part and part.keys() <= right.keys()
      for path, leaf in part.items():
        assert leaf.tobytes() == right[path].tobytes(), path


@EVERY
def test_state_that_belongs_to_a_parameter_stands_under_its_path(name):
  params = values(0)
  state = flat(stacked_transform(name).init(nested(params)))
  for path, leaf in state.items():
    owners = [owner for owner in params if path.endswith(f"/{owner}")]
    assert owners or leaf.size <= 3, f"{path} {leaf.shape} belongs to no parameter"
  for owner in params:
    assert any(path.endswith(f"/{owner}") for path in state)


@EVERY
def test_an_update_that_is_not_ok_leaves_every_bit_of_the_state(name):
  transform = stacked_transform(name, schedule=Cosine(warmup_steps=2))
  update, params = jax.jit(transform.update), nested(values(0))
  _, state = update(nested(values(1)), transform.init(params), params)
  bad = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), nested(values(2)))
  _, kept = update(bad, state, params, ok=jnp.bool_(False))
  _, moved = update(nested(values(2)), state, params, ok=jnp.bool_(True))
  _, right = update(nested(values(2)), state, params)
  for path, leaf in flat(kept).items():
    assert leaf.tobytes() == flat(state)[path].tobytes(), path
    np.testing.assert_allclose(flat(moved)[path], flat(right)[path], rtol=1e-6, err_msg=path)
  assert any(np.any(leaf != flat(state)[path]) for path, leaf in flat(moved).items())


@EVERY
def test_without_gradients_only_decay_moves_parameters(name):
  transform = stacked_transform(name)
  params = values(0)
  zeros = jax.tree.map(jnp.zeros_like, nested(params))
  state = transform.init(nested(params))
  for _ in range(2):
    updates, state = jax.jit(transform.update)(zeros, state, nested(params))
    for path, update in flat(updates).items():
      still = path.endswith(("scale", "bias")) or path.startswith("embed/")
      decay = 0.0 if still else OPTIMIZERS[name][1].weight_decay
      np.testing.assert_allclose(update, -0.1 * decay * params[path], rtol=1e-6, err_msg=path)


@EVERY
def test_a_quadratic_falls_in_every_parameter(name):
  transform = stacked_transform(name, clip_norm=None)
  start = params = jax.tree.map(jnp.sign, nested(values(0)))
  state, update = transform.init(params), jax.jit(transform.update)
  for _ in range(12):
    updates, state = update(params, state, params)
    params = optax.apply_updates(params, updates)
  start = flat(start)
  for path, leaf in flat(params).items():
    assert np.sum(leaf**2) < 0.7 * np.sum(start[path] ** 2), path


@EVERY
def test_update_is_a_pure_function_that_compiles_once_and_takes_donated_buffers(name):
  transform = stacked_transform(name, schedule=Cosine(warmup_steps=2))

  def step(params, state, gradients):
    updates, state = transform.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  kept, given = jax.jit(step), jax.jit(step, donate_argnums=(0, 1))
  params, gradients = nested(values(0)), nested(values(1))
  state = transform.init(params)
  before = jax.tree.map(np.array, (params, state))
  want = kept(params, state, gradients)
  for again, first in zip(jax.tree.leaves(kept(params, state, gradients)), jax.tree.leaves(want)):
    np.testing.assert_array_equal(again, first)
  jax.tree.map(np.testing.assert_array_equal, (params, state), before)
  want = kept(*want, gradients)
  got = given(*given(params, state, gradients), gradients)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert kept._cache_size() == given._cache_size() == 1


@EVERY
def test_bfloat16_parameters_get_float32_moments_and_rounded_sums(name):
  transform = stacked_transform(name)
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nested(values(0)))
  gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nested(values(1)))
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (gradients, params))
  state = transform.init(params)
  updates, after = jax.jit(transform.update)(gradients, state, params)
  want, want_after = jax.jit(transform.update)(wide[0], transform.init(wide[1]), wide[1])
  assert {leaf.dtype for leaf in jax.tree.leaves((state, updates))} <= {
    jnp.dtype("float32"),
    jnp.dtype("int32"),
  }
  for got, leaf in zip(*map(jax.tree.leaves, ((updates, after), (want, want_after)))):
    np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-6)
  assert all(
    leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(optax.apply_updates(params, updates))
  )


@EVERY
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_recipe_survives_json(name, schedule):
  optim = Optim(OPTIMIZERS[name][1], SCHEDULES[schedule][1], clip_norm=None, no_decay=("*x",))
  assert config_io.from_json(Optim, config_io.to_json(optim)) == optim
