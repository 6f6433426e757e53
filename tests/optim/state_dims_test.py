import jax
import numpy as np
import pytest

from jaxmoe.core.layout import is_dims, one_device
from jaxmoe.core.param_names import flatten
from jaxmoe.optim import OPTIMIZERS, Adafactor, Constant, Optim, make_optimizer, state_dims

SIZES = {"layer": 2, "expert": 3, "embed": 8, "gate": 1, "mlp": 7, "heads": 4, "head": 5}
DIMS = {
  "final_norm": {"scale": ("embed",)},
  "stack": {
    "0": {
      "0": {
        "q": ("layer", "embed", "heads", "head"),
        "gate_up": ("layer", "expert", "embed", "gate", "mlp"),
        "scale": ("layer", "embed"),
      }
    }
  },
}
NAMES = {
  "final_norm": {"scale": "final_norm/scale"},
  "stack": {"0": {"0": {name: f"layers/0/{name}" for name in ("q", "gate_up", "scale")}}},
}
PARAMS = jax.tree.map(
  lambda dims: jax.ShapeDtypeStruct(tuple(SIZES[dim] for dim in dims), np.float32),
  DIMS,
  is_leaf=is_dims,
)


def abstract_state(optimizer):
  transform = make_optimizer(Optim(optimizer, Constant()), 5, NAMES, DIMS)
  return jax.eval_shape(transform.init, PARAMS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_dim_of_the_state_is_named_as_large_as_it_is(name):
  state = abstract_state(OPTIMIZERS[name][1])
  dims = state_dims(state, PARAMS, DIMS)
  for path, leaf in flatten(state).items():
    names = dict(zip(flatten(state), jax.tree.structure(state).flatten_up_to(dims)))[path]
    assert len(names) == leaf.ndim, path
    for dim, size in zip(names, leaf.shape):
      assert dim is None or SIZES[dim] == size, path
    if "stack" in path:
      assert names[0] == "layer", path
    if leaf.size > 7:
      assert None not in names, path
  one_device().shardings("optimizer", dims, state)


def test_rows_and_columns_keep_the_names_that_are_left():
  state = abstract_state(Adafactor(min_dim_size_to_factor=2))
  dims = state_dims(state, PARAMS, DIMS)[1]
  block = dims.v_row["stack"]["0"]["0"], dims.v_col["stack"]["0"]["0"]
  assert block[0]["gate_up"] == ("layer", "expert", "gate", "mlp")
  assert block[1]["gate_up"] == ("layer", "expert", "embed", "gate")
  assert block[0]["q"] == ("layer", "heads", "head")
  assert block[0]["scale"] == ("layer", None)
  assert dims.v["final_norm"]["scale"] == ("embed",)
  assert dims.count == ()
