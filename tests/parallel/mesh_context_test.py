"""The context of a mesh: axes are named by the degrees alone, and one device asks for nothing."""

import ast
import pathlib

import jax
import pytest

from jaxmoe.core.parallel_context import ONE_DEVICE
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MoEConfig
from jaxmoe.parallel import AXES, AxisNames, MeshContext, Parallel
from tests.multidevice.programs import decoder_of, lower_gradients

ROOT = pathlib.Path(__file__).parents[2] / "jaxmoe"
DEGREES = {"fsdp": 2, "expert": 2, "tensor": 2, "sequence": True}
BLOCK = BlockConfig(SoftmaxAttention(num_heads=2, num_kv_heads=1, head_dim=4), MoEConfig(4, 2))


class Renamed(Parallel):
  """Degrees whose mesh has axes of other names."""

  axes = AxisNames(data="replicas", fsdp="shards", expert="mixture", tensor="megatron")


@pytest.mark.parametrize(
  "name",
  [
    "core/parallel_context.py", "parallel/mesh_context.py", "parallel/replication.py",
    "parallel/scan_prefetch.py", "parallel/zero.py", "train/sharded_gradients.py",
  ],
)  # fmt: skip
def test_no_axis_is_named_where_collectives_are(name):
  tree = ast.parse((ROOT / name).read_text())
  strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
  assert not strings & set(AXES)


def program(parallel):
  decoder = decoder_of(BLOCK, 2, 8, 16)
  lowered, mesh = lower_gradients(decoder, parallel, (8, 4))
  return lowered.as_text(), mesh


def test_a_mesh_whose_axes_have_other_names_runs_the_same_program():
  text, mesh = program(Parallel(**DEGREES))
  other, renamed = program(Renamed(**DEGREES))
  assert renamed.axis_names == ("replicas", "shards", "mixture", "megatron")
  for new, old in zip(renamed.axis_names, mesh.axis_names, strict=True):
    assert f'"{new}"' in other
    other = other.replace(f'"{new}"', f'"{old}"')
  assert other == text


def test_one_device_uses_parameters_as_they_are_stored():
  params = {"embed": {"table": jax.numpy.ones(2)}}
  assert ONE_DEVICE.gather_params(params) is params
  assert ONE_DEVICE.gather_layer("0", params) is params
  assert ONE_DEVICE.scan_with_prefetch is ONE_DEVICE.remat_policy is None


def test_contexts_of_the_same_degrees_are_equal():
  assert MeshContext(Parallel(data=2)) == MeshContext(Parallel(data=2), params=None)
  assert hash(MeshContext(Parallel(data=2))) == hash(MeshContext(Parallel(data=2)))
