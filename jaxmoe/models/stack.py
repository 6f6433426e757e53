"""A stack of blocks: patterns that repeat, run by scan or layer by layer over the same leaves.

`Stack((LayerGroup((dense,)), LayerGroup((local, full), repeats=12)))` is one dense layer followed
by 24 that alternate. In memory, leaf `stack/s/j/...` holds the j-th block of layer group s for all
repeats, stacked in dim 0; `core/param_names.py` gives each layer its own name. Over the stages of a
pipeline dim 0 has an order of its own, and empty places.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.core.param_names import LayerGroupSizes, PlacedGroup
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.cache import NoCache
from jaxmoe.models.layer_runs import in_memory_order, join_runs, repeats_apart
from jaxmoe.models.residual import ResidualStream

Remat = Literal["none", "full", "dots"]
Handed = tuple[jax.Array, Any]
"""What a block is handed: the stream, (B, L, D), and the logits of gates of the layer before."""
POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@dataclasses.dataclass(frozen=True)
class LayerGroup:
  """A pattern of blocks, repeated."""

  pattern: tuple[BlockConfig, ...] = (BlockConfig(),)
  repeats: int = 2

  def __post_init__(self) -> None:
    if self.repeats < 1:
      raise InputError(f"repeats must be at least 1: repeats={self.repeats}")
    if not self.pattern:
      raise InputError("a pattern needs at least one block")


def layer_group_sizes(groups: tuple[LayerGroup, ...]) -> LayerGroupSizes:
  """Returns how layers are grouped in memory where they lie in order."""
  return tuple((len(group.pattern), group.repeats) for group in groups)


class Stack:
  """The functions of a stack: it holds records and no arrays.

  Attributes:
    groups: The layers.
    stream: What they read and add to.
    parallel: What happens where arrays cross devices.
    scan: Whether repeats run by `lax.scan`, or unrolled.
    remat: What the backward pass makes again.
    layer_groups: How layers are grouped in memory, for `core/param_names.py`.
  """

  def __init__(
    self,
    groups: tuple[LayerGroup, ...],
    stream: ResidualStream,
    parallel: ParallelContext = ONE_DEVICE,
    scan: bool = True,
    remat: Remat = "none",
    layer_groups: LayerGroupSizes | None = None,
  ):
    self.groups, self.stream, self.parallel = groups, stream, parallel
    self.scan, self.remat = scan, remat
    self.layer_groups: LayerGroupSizes = layer_groups or layer_group_sizes(groups)
    self._placed = any(isinstance(size, PlacedGroup) for size in self.layer_groups)

  def layer_indices(self, group: int, position: int) -> list[int]:
    """Returns the depth of each repeat of one block of a pattern, as they lie in memory."""
    return param_names.layer_depths(group, position, self.layer_groups)

  def declared(self, init: Init) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Returns graph definitions and leaves, by group and position, for an init that declares.

    Leaves are stacked over repeats; a layer's draw depends on its depth alone.
    """
    graphs: dict[str, dict[str, Any]] = {}
    leaves: dict[str, dict[str, Any]] = {}
    for s, group in enumerate(self.groups):
      for j, block in enumerate(group.pattern):
        graph, state = nnx.split(block.build(init / "layer", self.stream, self.parallel))
        layers = tuple(self.layer_indices(s, j))
        graphs.setdefault(str(s), {})[str(j)] = graph
        stacked = functools.partial(dataclasses.replace, layers=layers)
        leaves.setdefault(str(s), {})[str(j)] = jax.tree.map(stacked, state)
    return graphs, leaves

  def run(
    self,
    graphs: dict[str, dict[str, Any]],
    params: Any,
    state: Handed,
    tokens: Tokens,
    caches: Any = None,
    keys: Keys | None = None,
  ) -> tuple[jax.Array, Any, Any]:
    """Runs every block over the stream.

    Args:
      graphs: Graph definitions by group and position.
      params: Leaves by group and position, stacked over repeats; or taken apart, see `apart`.
      state: The stream, (B, L, D), and what the first block is handed by the gates of earlier ones.
      tokens: What is known of each token.
      caches: Caches by group and position, stacked over repeats; apart where parameters are; None
        to attend afresh.
      keys: Randomness of the forward pass, for routers that use it.

    Returns:
      The stream, the caches (None without any) and the MoE sums by group and position, stacked
      over repeats (None for dense blocks); those of attention experts under `J.attention`.
    """
    if isinstance(params, tuple):
      return self._run_apart(graphs, params, state, tokens, caches, keys)
    if self._placed:
      return self._run_placed(graphs, params, state, tokens, caches, keys)
    new_caches, sums, depth = {}, {}, 0
    for s in sorted(params, key=int):  # as text 10 would come before 2
      group_params = params[s]
      here = None if caches is None else caches[s]
      state, (new_caches[s], sums[s]) = self.run_group(
        (s, graphs[s], depth), group_params, state, tokens, here, keys
      )
      depth += jax.tree.leaves(group_params)[0].shape[0] * len(group_params)
    return state[0], None if caches is None else new_caches, sums

  def empty_caches(self, batch: int, slots: int, dtype: Any) -> dict[str, dict[str, Any]]:
    """Returns empty caches by group and position, stacked over repeats."""

    def stacked(group: LayerGroup, block: BlockConfig) -> Any:
      one = block.attention.empty_cache(batch, slots, dtype)
      return jax.tree.map(lambda leaf: jnp.stack([leaf] * group.repeats), one)

    return {
      str(s): {str(j): stacked(group, block) for j, block in enumerate(group.pattern)}
      for s, group in enumerate(self.groups)
    }

  def apart(self, tree: dict[str, dict[str, Any]]) -> Any:
    """Returns what is stacked over repeats as arrays of one repeat each, in order of depth.

    A product reads a layer's own leaf as fast as memory goes; out of stacked ones it is copied.
    Layers that lie over stages stay as they are, for no device has room for all.
    """
    if self._placed:
      return tree
    return tuple(run.take(tree) for run in repeats_apart(self.layer_groups))

  def _run_placed(
    self, graphs: dict[str, dict[str, Any]], params: Any, state: Handed, tokens: Tokens,
    caches: Any, keys: Keys | None,
  ) -> tuple[jax.Array, Any, Any]:  # fmt: skip
    """Does what `run` does, of parameters in an order of their own that lie over devices.

    Caches are in order of depth, as `empty_caches` makes them.

    A layer is taken out of its stacked leaves by a product with a one in its row, so that it goes
    over devices as a sum of parts, of which all but one are zeros: no device holds more than its
    own layers and this one. Weights must be finite.
    """
    new_caches, sums, depth = {}, {}, 0
    for s in sorted(params, key=int):
      width, repeats, rows = self.layer_groups[int(s)]  # type: ignore[misc]
      at = {str(j): jnp.array([rows[j].index(r) for r in range(repeats)]) for j in range(width)}
      gather = functools.partial(_taken, params[s])
      step = self._step(s, graphs[s], tokens, keys, gather)
      inputs = (at, None if caches is None else caches[s], depth + jnp.arange(repeats) * width)
      runs = jax.lax.scan if self.scan else _unrolled
      state, (new_caches[s], sums[s]) = runs(step, state, inputs)
      depth += repeats * width
    in_order = in_memory_order(sums, self.layer_groups)
    return state[0], None if caches is None else new_caches, in_order

  def _run_apart(
    self, graphs: dict[str, dict[str, Any]], params: tuple[Any, ...], state: Handed, tokens: Tokens,
    caches: tuple[Any, ...] | None, keys: Keys | None,
  ) -> tuple[jax.Array, Any, Any]:
    """Does what `run` does, of parameters and caches that are apart."""  # fmt: skip
    runs, new_caches, sums = repeats_apart(self.layer_groups), [], []
    for at, (run, weights) in enumerate(zip(runs, params, strict=True)):
      group = run.group, graphs[run.group], run.depth
      here = None if caches is None else caches[at]
      state, (cache, found) = self.run_group(group, weights, state, tokens, here, keys)
      new_caches.append(cache)
      sums.append(found)
    joined = in_memory_order(join_runs(runs, sums), self.layer_groups)
    return state[0], None if caches is None else tuple(new_caches), joined

  def run_group(
    self,
    group: tuple[str, dict[str, Any], int],
    params: dict[str, Any],
    state: Handed,
    tokens: Tokens,
    caches: dict[str, Any] | None = None,
    keys: Keys | None = None,
  ) -> tuple[Handed, tuple[dict[str, Any], dict[str, Any]]]:
    """Runs the blocks of a layer group, or a run of them, over the stream.

    Args:
      group: Its name, graph definitions by position, and the depth of its first repeat.
      params: Leaves by position, stacked over repeats, as they are stored.
      state: As in `run`, and so are the others.

    Returns:
      What the next group is handed; caches and MoE sums by position, stacked over repeats.
    """
    s, graphs, depth = group
    repeats = jax.tree.leaves(params)[0].shape[0]
    gather = functools.partial(self.parallel.gather_layer, s)
    scans = self.scan and repeats > 1
    if (prefetching := self.parallel.scan_with_prefetch) is not None:
      assert caches is None, "weights are gathered ahead in training alone"
      step = functools.partial(_numbered, self._step(s, graphs, tokens, keys), depth)
      return prefetching(step, gather, state, params, not scans)
    step = self._step(s, graphs, tokens, keys, gather)
    inputs = (params, caches, depth + jnp.arange(repeats) * len(params))
    return (jax.lax.scan if scans else _unrolled)(step, state, inputs)

  def _step(
    self,
    s: str,
    graphs: dict[str, Any],
    tokens: Tokens,
    keys: Keys | None,
    gather: Callable[[Any], Any] = lambda params: params,
  ) -> Any:
    """Returns the body that runs a pattern once, as `lax.scan` wants it."""

    def step_of(given: tuple[Tokens, Keys | None], state: Any, inputs: Any) -> tuple[Any, Any]:
      (tokens, keys), (x_BLD, carry), (params, caches, index) = given, state, inputs
      new_caches, sums = {}, {}
      ready = gather(params)
      for j in sorted(ready, key=int):
        block, depth = nnx.merge(graphs[j], ready[j]), index + int(j)
        cache = NoCache(self.parallel) if caches is None else caches[j]
        here = None if keys is None else keys.at(depth)
        x_BLD, carry, cache, found = block(x_BLD, carry, tokens.at(depth), cache, here)
        sums[j] = found.get("moe")
        if "attention" in found:
          sums[param_names.LayerAddress(s, j, param_names.ATTENTION).place] = found["attention"]
        new_caches[j] = None if caches is None else cache
      return (x_BLD, carry), (new_caches, sums)

    if self.parallel.shard_residual:
      return functools.partial(_sharded_residual(step_of, self.parallel), (tokens, keys))
    step, policy = functools.partial(step_of, (tokens, keys)), self.parallel.remat_policy
    if self.remat == "none" and policy is None:
      return step
    return jax.checkpoint(step, policy=policy if self.remat == "none" else POLICIES[self.remat])


def _sharded_residual(step: Any, parallel: ParallelContext) -> Any:
  """Returns a step that is made again in the backward pass from a part of its stream (ZeRO-R).

  What a rule of differentiation needs in a scan is an argument: hence `given`, constants.
  """

  @jax.custom_vjp
  def again(given: Any, state: tuple[Any, Any], inputs: Any) -> tuple[Any, Any]:
    return step(given, state, inputs)

  def forward(given: Any, state: tuple[Any, Any], inputs: Any) -> tuple[Any, Any]:
    x_BLD, carry = state
    return step(given, state, inputs), (given, parallel.slice_tokens(x_BLD), carry, inputs)

  def backward(kept: Any, cotangents: Any) -> Any:
    given, part, carry, inputs = kept
    state = parallel.all_gather_tokens(part), carry
    return jax.vjp(step, given, state, inputs)[1](cotangents)

  again.defvjp(forward, backward)
  return again


def _taken(stacked: dict[str, Any], rows: dict[str, jax.Array]) -> dict[str, Any]:
  """Returns the leaves that lie in these rows, by position of a pattern.

  A product, of which each device makes its own rows' share and one layer is sent: so a weight that
  is not finite spoils what is taken of every layer, as it would spoil what comes out at last.
  """

  def take(row: jax.Array, leaf: jax.Array) -> jax.Array:
    one = (jnp.arange(leaf.shape[0]) == row).astype(leaf.dtype)
    return jnp.tensordot(one, leaf, 1, precision=jax.lax.Precision.HIGHEST)

  return {j: jax.tree.map(functools.partial(take, row), stacked[j]) for j, row in rows.items()}


def _numbered(step: Any, first: int, state: Any, params: Any, number: jax.Array) -> Any:
  """Does a step of a pattern whose first block is the n-th of its group's, n from 0."""
  return step(state, (params, None, first + number * len(params)))


def _unrolled(step: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
  """Does what `lax.scan(step, state, inputs)` does, one iteration after the other."""
  repeats = jax.tree.leaves(inputs)[0].shape[0]
  outputs = []
  for repeat in range(repeats):
    state, output = step(state, jax.tree.map(lambda leaf, r=repeat: leaf[r], inputs))
    outputs.append(output)
  return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
