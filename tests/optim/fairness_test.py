import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.ops.soft_tree import TreeSums, log_leaves, tree_sums
from jaxmoe.optim import OnlineFairness

T, D, N, S = 60, 3, 7, 3
targets = pytest.mark.parametrize("target", ["parity", "load"])


def draw(seed=0, biased=0.8):
  """Returns parameters, rows and groups, of which none is alike another."""
  rng = np.random.default_rng(seed)
  params = {"weight": rng.normal(size=(D, N)), "bias": rng.normal(size=N)}
  groups = rng.integers(0, S, T)
  rows = rng.normal(size=(T, D)) + biased * groups[:, None]
  return jax.tree.map(jnp.float32, params), jnp.float32(rows), jnp.asarray(groups)


def penalty(params, rows, groups, config):
  """The objective of all tokens at once: Huber of the difference of every two groups."""
  logits = rows @ params["weight"] + params["bias"][None]
  values = jax.nn.sigmoid(logits) if config.target == "parity" else jnp.exp(log_leaves(logits))
  means = [jnp.mean(values[groups == group], axis=0) for group in np.unique(groups)]
  total = 0.0
  for one, other in itertools.combinations(means, 2):
    gap = jnp.abs(one - other)
    huber = jnp.where(gap < config.delta, gap**2 / 2, config.delta * (gap - config.delta / 2))
    total += config.weight * jnp.sum(huber) / config.delta
  return total


def seen(params, rows, groups, config, num_groups=S):
  """Returns what the groups see of the tree."""
  logits = rows @ params["weight"] + params["bias"][None]
  return tree_sums(logits, rows, jax.nn.one_hot(groups, num_groups), config.target)


def feed(config, params, batches):
  """Returns what is added to a gradient of ones after these batches, and the state."""
  transform, tree = config.transform(["a/tree"], S), {"a": {"tree": params}, "b": jnp.ones(2)}
  ones, state = jax.tree.map(jnp.ones_like, tree), transform.init(tree)
  update = jax.jit(transform.update)
  for rows, groups in batches:
    trees = {"a/tree": seen(params, rows, groups, config)}
    updates, state = update(ones, state, tree, trees=trees)
  assert (updates["b"] == 1).all(), "no other parameter is pulled"
  return jax.tree.map(lambda leaf: leaf - 1, updates["a"]["tree"]), state["a/tree"]


def close(found, right):
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6), found, right
  )


@targets
def test_with_frozen_parameters_a_stream_gives_the_gradient_of_the_whole_batch(target):
  config = OnlineFairness(0.7, target, decay=1.0, delta=0.2)
  params, rows, groups = draw()
  right = jax.grad(penalty)(params, rows, np.asarray(groups), config)
  assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(right)) > 0.01
  bounds = [0, 1, 30, T]
  batches = [(rows[a:b], groups[a:b]) for a, b in itertools.pairwise(bounds)]
  found, state = feed(config, params, batches)
  close(found, right)
  _, first = feed(config, params, batches[:1])
  assert [leaf.shape for leaf in state] == [leaf.shape for leaf in first]


@targets
def test_a_mean_that_has_just_begun_is_not_pulled_to_zero_and_old_batches_fade(target):
  config = OnlineFairness(1.0, target, decay=0.5, delta=0.2)
  params, rows, groups = draw()
  right = jax.grad(penalty)(params, rows, np.asarray(groups), config)
  close(feed(config, params, [(rows, groups)])[0], right)
  _, others, _ = draw(seed=5, biased=-0.8)
  batches = [(others, groups)] + 14 * [(rows, groups)]
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4),
    feed(config, params, batches)[0], right,
  )  # fmt: skip


def test_a_group_that_is_absent_keeps_its_means_and_one_never_seen_pulls_nobody():
  config = OnlineFairness(1.0, decay=0.01, delta=0.2)
  params, rows, groups = draw()
  only = jnp.where(groups == 2, -1, groups)
  right = jax.grad(penalty)(params, rows[only >= 0], np.asarray(groups)[only >= 0], config)
  close(feed(config, params, [(rows, only)])[0], right)
  nobody = (rows, jnp.full_like(groups, -1))
  before = feed(config, params, [(rows, groups)])[0]
  close(feed(config, params, [(rows, groups)] + 40 * [nobody])[0], before)
  alone = feed(config, params, [(rows, jnp.zeros_like(groups))])[0]
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(alone))


@targets
def test_trees_stacked_over_layers_are_pulled_each_by_its_own_means(target):
  config = OnlineFairness(1.0, target, delta=0.2)
  layers = [draw(seed) for seed in range(2)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for params, _, _ in layers))
  transform = config.transform(["tree"], S)
  state = transform.init({"tree": stacked})
  sums = [seen(*layer, config) for layer in layers]
  trees = {"tree": jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums)}
  zeros = {"tree": jax.tree.map(jnp.zeros_like, stacked)}
  for _ in range(2):
    updates, state = transform.update(zeros, state, trees=trees)
  for at, (params, rows, groups) in enumerate(layers):
    right, alone = feed(config, params, 2 * [(rows, groups)])
    close(jax.tree.map(lambda leaf, at=at: leaf[at], updates["tree"]), right)
    close(jax.tree.map(lambda leaf, at=at: leaf[at], state["tree"]), alone)


def test_the_pull_grows_to_its_weight_without_a_jump():
  pulls = []
  for gap in (0.005, 0.0099, 0.0101, 0.3):
    slope = jnp.array([[[[0.0, 1.0]]], [[[0.0, 0.0]]]])
    sums = TreeSums(jnp.ones(2), jnp.array([[gap], [0.0]]), slope)
    pulls.append(float(OnlineFairness(1.0).pull(sums)[1][0]))
  np.testing.assert_allclose(pulls, [0.5, 0.99, 1.0, 1.0], rtol=1e-4)


@functools.partial(jax.jit, static_argnums=0)
def learn(config, rows, groups, labels):
  """Returns scores of all rows by a tree that saw the stream once, a row at a time."""
  params = {"tree": {"weight": 0.1 * jnp.ones((rows.shape[1], 3)), "bias": jnp.zeros(3)},
            "leaves": jnp.array([1.0, 0.3, -0.3, -1.0])}  # fmt: skip
  transform = optax.chain(config.transform(["tree"], 2), optax.adam(0.01))

  def scores(params, rows):
    logits = rows @ params["tree"]["weight"] + params["tree"]["bias"][None]
    return jnp.exp(log_leaves(logits)) @ params["leaves"]

  def step(state, drawn):
    params, inner = state
    row, group, label = drawn
    loss = lambda params: optax.sigmoid_binary_cross_entropy(scores(params, row[None])[0], label)  # noqa: E731
    trees = {"tree": seen(params["tree"], row[None], group[None], config, num_groups=2)}
    updates, inner = transform.update(jax.grad(loss)(params), inner, params, trees=trees)
    return (optax.apply_updates(params, updates), inner), None

  state = (params, transform.init(params))
  (params, _), _ = jax.lax.scan(step, state, (rows, groups, labels))
  return scores(params, rows)


def test_on_a_biased_stream_of_single_rows_the_gap_falls_to_half_for_3_points_of_accuracy():
  rng, num = np.random.default_rng(0), 6000
  groups = rng.integers(0, 2, num)
  rows = rng.normal(size=(num, 3))
  rows[:, 0] += 0.22 * (2 * groups - 1)
  rows[:, 1] = groups - 0.5
  labels = (rows[:, 0] + 0.3 * rng.normal(size=num) > 0).astype(np.float32)
  gaps, right = [], []
  for weight in (0.0, 1.0):
    scores = learn(OnlineFairness(weight=weight), jnp.float32(rows), jnp.asarray(groups), labels)
    yes = np.asarray(scores) > 0
    gaps.append(abs(yes[groups == 1].mean() - yes[groups == 0].mean()))
    right.append(np.mean(yes == labels))
  assert right[0] > 0.85 and gaps[0] > 0.12
  assert gaps[1] < gaps[0] / 2 and right[1] > right[0] - 0.03


@pytest.mark.parametrize(
  "fields", [{"target": "all"}, {"weight": -1.0}, {"decay": 0.0}, {"delta": 0.0}], ids=str
)
def test_settings_without_a_meaning_are_refused(fields):
  with pytest.raises(InputError, match=r"must be parity or load|must not be negative"):
    OnlineFairness(**fields)


def test_one_group_has_nobody_to_be_like():
  with pytest.raises(InputError, match="at least 2 of them: 1 given"):
    OnlineFairness(1.0).transform(["tree"], 1)
