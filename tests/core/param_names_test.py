import jax
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError

SPLITS = ((1, 1), (2, 3), (1, 2))


def layer_value(layer: int) -> np.ndarray:
  return np.arange(6).reshape(2, 3) + 100 * layer


def tree() -> dict:
  """Nine layers, each stored as the value of its number, grouped as SPLITS says."""
  return {
    "embed": {"table": np.ones(3)},
    "stack": {
      "0": {"0": {"w": layer_value(0)[None]}},
      "1": {
        "0": {"w": np.stack([layer_value(n) for n in (1, 3, 5)])},
        "1": {"w": np.stack([layer_value(n) for n in (2, 4, 6)])},
      },
      "2": {"0": {"w": np.stack([layer_value(n) for n in (7, 8)])}},
    },
  }


def test_every_layer_has_its_own_name_in_order_of_depth():
  named = param_names.unstack(param_names.flatten(tree()), SPLITS)
  assert sorted(named) == sorted(["embed/table", *(f"layers/{n}/w" for n in range(9))])
  for layer in range(9):
    np.testing.assert_array_equal(named[f"layers/{layer}/w"], layer_value(layer))


def test_stack_is_the_inverse_of_unstack_also_inside_optimizer_state():
  state = {"optimizer": ({"mu": tree(), "count": np.zeros(())},), "params": tree()}
  flat = param_names.flatten(state)
  named = param_names.unstack(flat, SPLITS)
  assert "optimizer/0/mu/layers/8/w" in named
  again = param_names.unflatten(state, param_names.stack(named, list(flat), SPLITS))
  jax.tree.map(np.testing.assert_array_equal, again, state)


def test_another_split_of_the_same_layers_reads_the_same_names():
  named = param_names.unstack(param_names.flatten(tree()), SPLITS)
  paths = ["embed/table", "stack/0/0/w", "stack/0/1/w", "stack/0/2/w"]
  other = param_names.stack(named, paths, ((3, 3),))
  assert param_names.unstack(other, ((3, 3),)).keys() == named.keys()
  np.testing.assert_array_equal(other["stack/0/1/w"][2], layer_value(7))


def test_a_missing_layer_is_named():
  with pytest.raises(InputError, match="'layers/2/w' is missing"):
    param_names.stack({"layers/0/w": 0, "layers/1/w": 1}, ["stack/0/0/w"], ((1, 3),))


def test_the_canonical_name_of_a_stacked_leaf_is_its_first_layer():
  assert param_names.canonical_name("stack/1/1/w", SPLITS) == "layers/2/w"
  assert param_names.canonical_name("embed/table", SPLITS) == "embed/table"
