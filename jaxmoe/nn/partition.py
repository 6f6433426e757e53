"""Sharding of a module's weights over a mesh, by the logical dims that each of them has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def shard(module: nnx.Module, mesh: Mesh, rules: Mapping[str, Any]) -> None:
  """Lays the weights of a module out over a mesh, in place.

      jaxmoe.nn.shard(model, mesh, {"expert": "expert", "mlp": "tensor"})

  Args:
    module: Any; weights of layers that are not ours have no dims, and lie on all devices.
    mesh: The devices.
    rules: The mesh axis, or axes, of each logical dim: `expert`, `embed`, `mlp`, `heads`,
      `kv_heads`, `vocab`; other dims are not divided.
  """

  def lay(leaf: nnx.Variable) -> nnx.Variable:
    dims = leaf.get_metadata().get("dims", ())
    spec = PartitionSpec(*(rules.get(dim) if dim else None for dim in dims))
    return leaf.replace(jax.device_put(leaf.get_value(), NamedSharding(mesh, spec)))

  is_leaf = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
  nnx.update(module, jax.tree.map(lay, nnx.state(module), is_leaf=is_leaf))
