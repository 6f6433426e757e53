import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import Layout, one_device

RULES = {"params": {"mlp": ("data",), "vocab": ("data",)}}


def wide_layout(degree: int) -> Layout:
  """A Layout over an abstract mesh: specs need no devices."""
  mesh = jax.sharding.AbstractMesh((degree,), ("data",), axis_types=(AxisType.Auto,))
  return Layout(mesh, RULES)  # type: ignore[arg-type]


def test_rules_map_logical_dims_to_mesh_axes_by_role():
  layout = wide_layout(4)
  assert layout.spec("params", ("embed", "mlp")) == PartitionSpec(None, "data")
  assert layout.spec("optimizer", ("embed", "mlp")) == PartitionSpec(None, None)


def test_a_mesh_axis_shards_one_dim_of_an_array_at_most():
  assert wide_layout(4).spec("params", ("mlp", "vocab")) == PartitionSpec("data", None)


def test_a_dim_that_does_not_divide_is_refused_by_name():
  with pytest.raises(InputError, match="'mlp' of size 6 does not divide by 4"):
    wide_layout(4).sharding("params", ("embed", "mlp"), (8, 6))


def test_a_rule_with_an_unknown_mesh_axis_is_refused():
  mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
  with pytest.raises(InputError, match="tensor"):
    Layout(mesh, {"params": {"mlp": ("tensor",)}})


def test_one_device_puts_every_array_whole_on_it():
  sharding = one_device().sharding("params", ("embed", "mlp"), (3, 5))
  assert sharding.is_fully_replicated
  assert len(sharding.device_set) == 1


def test_dims_and_shape_must_have_the_same_length():
  with pytest.raises(InputError, match="cannot have the dims"):
    one_device().sharding("params", ("embed",), (3, 5))


def mesh_of(**degrees):
  types = (AxisType.Auto,) * len(degrees)
  return jax.sharding.AbstractMesh(tuple(degrees.values()), tuple(degrees), axis_types=types)


def test_a_leaf_is_spread_along_its_largest_free_dim_that_divides_never_along_layers():
  rules = {"params": {"mlp": ("tensor",)}}
  layout = Layout(mesh_of(fsdp=4, tensor=2), rules, sharded={"params": ("fsdp",)})
  spec = layout.spec("params", ("layer", "embed", "mlp"), (64, 8, 32))
  assert spec == PartitionSpec(None, "fsdp", "tensor")
  assert layout.spec("params", ("embed", None), (6, 4)) == PartitionSpec(None, "fsdp")
  assert layout.spec("params", ("layer", "embed"), (4, 6)) == PartitionSpec(None, None)
  assert layout.spec("grads", ("embed",), (8,)) == PartitionSpec(None)


def test_a_dim_that_yields_stays_whole_where_it_does_not_divide():
  layout = Layout(
    mesh_of(tensor=4), {"params": {"vocab": ("tensor",)}}, may_replicate=frozenset({"vocab"})
  )
  assert layout.spec("params", ("vocab", "embed"), (22, 8)) == PartitionSpec(None, None)
  assert layout.spec("params", ("vocab", "embed"), (24, 8)) == PartitionSpec("tensor", None)


def test_experts_are_spread_where_their_dim_comes_first_and_gates_are_not():
  layout = Layout(mesh_of(expert=2), {"params": {"expert": ("expert",)}})
  spread = PartitionSpec(None, "expert", None, None)
  assert layout.spec("params", ("layer", "expert", "embed", "mlp"), (3, 4, 8, 8)) == spread
  assert layout.spec("params", ("layer", "embed", "expert"), (3, 8, 4)) == PartitionSpec(
    None, None, None
  )


def test_a_rule_over_one_device_leaves_its_dim_free():
  rules = {"params": {"mlp": ("tensor",)}}
  layout = Layout(mesh_of(fsdp=4, tensor=1), rules, sharded={"params": ("fsdp",)})
  assert layout.spec("params", ("embed", "mlp"), (8, 32)) == PartitionSpec(None, "fsdp")
