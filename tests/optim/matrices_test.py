import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.optim.matrices import matrix_axes, stack_depth


@pytest.mark.parametrize(
  ("dims", "depth", "axes"),
  [
    (("layer", "embed", "heads", "head"), 1, ((1,), (2, 3))),
    (("embed", "heads", "head"), 0, ((0,), (1, 2))),
    (("layer", "heads", "head", "embed"), 1, ((1, 2), (3,))),
    (("layer", "expert", "embed", "gate", "mlp"), 2, ((2,), (4,))),
    (("expert", "embed", "gate", "mlp"), 1, ((1,), (3,))),
    (("layer", "expert", "mlp", "embed"), 2, ((2,), (3,))),
    (("layer", "embed", "expert"), 1, ((1,), (2,))),
    (("embed", "embed"), 0, ((0,), (1,))),
    (("layer", "embed", "head"), 1, ((1,), (2,))),
    (("layer", "embed"), 1, None),
    (("layer", "heads", "head"), 1, None),
    (("layer", "expert", "gate", "mlp"), 2, None),
    (("layer", "expert"), 1, None),
    (("layer",), 1, None),
    ((), 0, None),
  ],
)
def test_blocks_and_the_two_sides_of_a_matrix_are_read_from_the_dims(dims, depth, axes):
  assert stack_depth(dims) == depth
  assert matrix_axes("x", dims) == axes


def test_runs_of_before_take_the_one_head_of_keys_for_vectors():
  assert matrix_axes("k_rope", ("layer", "embed", "head"), single_heads=False) is None
  assert matrix_axes("q", ("embed", "heads", "head"), single_heads=False) == ((0,), (1, 2))


def test_a_matrix_with_three_sides_is_refused_by_name():
  with pytest.raises(InputError, match=r"layers/0/odd has 3.*adam_names"):
    matrix_axes("layers/0/odd", ("layer", "embed", "mlp", "rank"))
