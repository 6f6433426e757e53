"""Structures of trees as JSON: both ways, and nothing that JSON should not bring in."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxmoe.core import tree_json
from jaxmoe.core.metrics import Mean
from jaxmoe.core.rng import Keys
from jaxmoe.optim import OPTIMIZERS, Optim
from jaxmoe.optim.transform import make_optimizer


def kept(tree):
  """Returns the structure after a trip through text."""
  return tree_json.from_json(json.loads(json.dumps(tree_json.to_json(tree))))


@pytest.mark.parametrize(
  "tree",
  [
    3.0,
    None,
    (),
    {"b": [1, 2, (3, None)], "a": {}, "class": {"dict": 1}},
    [Mean(1.0, 2.0), optax.EmptyState()],
    Keys(1, path="attention"),
  ],
)
def test_a_structure_comes_back_from_json(tree):
  assert kept(tree) == jax.tree.structure(tree)


def test_what_a_structure_has_besides_leaves_is_a_part_of_it():
  assert kept(Keys(1, path="attention")) != jax.tree.structure(Keys(1, path="mlp"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_comes_back(name):
  params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
  names, dims = {"w": "w", "b": "b"}, {"w": ("embed", "hidden"), "b": ("embed",)}
  optim = Optim(OPTIMIZERS[name][1])
  state = jax.eval_shape(make_optimizer(optim, 1000, names, dims).init, params)
  assert kept(state) == jax.tree.structure(state)


def test_a_container_that_json_cannot_hold_is_refused():
  with pytest.raises(ValueError, match="cannot be kept"):
    tree_json.to_json({1: 2})


@pytest.mark.parametrize(
  "plain",
  [
    {"class": "os:system", "fields": {}},
    {"class": "jaxmoe.core.output:write_atomic", "fields": {"path": {"plain": "x"}}},
    {"class": "jaxmoe.core.rng:Nothing", "fields": {}},
    {"class": "jaxmoe.core.rng:Keys", "fields": {"seed": 0}},
    {"list": 3},
    {"set": []},
    "leaf",
  ],
)
def test_what_is_no_structure_is_refused(plain):
  with pytest.raises(ValueError, match=r"."):
    tree_json.from_json(plain)
