"""A stack of blocks: patterns that repeat, run by scan or layer by layer over the same leaves.

`Stack((LayerGroup((dense,)), LayerGroup((local, full), repeats=12)))` is one dense layer followed
by 24 that alternate. In memory, leaf `stack/s/j/...` holds the j-th block of layer group s for all
repeats, stacked in dim 0; `core/param_names.py` gives each layer its own name.
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
from jaxmoe.core.param_names import LayerGroupSizes
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.cache import NoCache
from jaxmoe.models.residual import ResidualStream

Remat = Literal["none", "full", "dots"]
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


class Stack:
  """The functions of a stack: it holds graph definitions and no arrays."""

  def __init__(
    self,
    groups: tuple[LayerGroup, ...],
    stream: ResidualStream,
    parallel: ParallelContext = ONE_DEVICE,
  ):
    self.groups, self.stream, self.parallel = groups, stream, parallel

  @property
  def layer_groups(self) -> LayerGroupSizes:
    """How layers are grouped in memory, for `core/param_names.py`."""
    return tuple((len(group.pattern), group.repeats) for group in self.groups)

  def layer_indices(self, group: int, position: int) -> list[int]:
    """Returns the depth of each repeat of one block of a pattern."""
    first = sum(blocks * repeats for blocks, repeats in self.layer_groups[:group])
    blocks, repeats = self.layer_groups[group]
    return [first + repeat * blocks + position for repeat in range(repeats)]

  def modules(self, init: Init) -> dict[str, dict[str, nnx.State]]:
    """Returns the leaves, stacked over repeats; a layer's draw depends on its depth alone."""

    def make(block: BlockConfig, layer: jax.Array) -> nnx.State:
      return nnx.state(block.build(init.at(layer) / "layer", self.stream))

    return {
      str(s): {
        str(j): jax.vmap(lambda layer, block=block: make(block, layer))(
          jnp.array(self.layer_indices(s, j))
        )
        for j, block in enumerate(group.pattern)
      }
      for s, group in enumerate(self.groups)
    }

  def graphs(self, init: Init) -> dict[str, dict[str, Any]]:
    """Returns the graph definition of each block of each pattern."""
    return {
      str(s): {
        str(j): nnx.graphdef(
          nnx.eval_shape(lambda b=block: b.build(init, self.stream, self.parallel))
        )
        for j, block in enumerate(group.pattern)
      }
      for s, group in enumerate(self.groups)
    }


@dataclasses.dataclass(frozen=True)
class Flow:
  """How a stack is run.

  Attributes:
    scan: By `lax.scan`, or unrolled.
    remat: What the backward pass makes again.
    arrive: Makes the weights of one run of a pattern ready, from its group and stored leaves;
      None where they are ready as they are stored.
    ahead: What runs layers whose weights arrive before they are used, in place of a scan:
      (step, arrive, state, stored leaves, unroll) -> (state, outputs).
    keep: The remat policy in place of keeping all, for weights that are not to be kept.
    parts: Where a layer is made again whole, how its stream is kept: (this device's part of it, all
      of it again); None keeps all.
  """

  scan: bool = True
  remat: Remat = "none"
  arrive: Callable[[str, Any], Any] | None = None
  ahead: Callable[..., tuple[Any, Any]] | None = None
  keep: Callable[..., bool] | None = None
  parts: tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]] | None = None


def run_stack(
  graphs: dict[str, dict[str, Any]],
  params: dict[str, dict[str, Any]],
  state: tuple[jax.Array, Any],
  tokens: Tokens,
  flow: Flow,
  caches: dict[str, dict[str, Any]] | None = None,
  keys: Keys | None = None,
) -> tuple[jax.Array, Any, Any]:
  """Runs every block over the stream.

  Args:
    graphs: Graph definitions by group and position.
    params: Leaves by group and position, stacked over repeats.
    state: The stream, (B, L, D), and what the first block is handed by the gates of earlier ones.
    tokens: What is known of each token.
    flow: Scan or not, remat or not.
    caches: Caches by group and position, stacked over repeats; None to attend afresh.
    keys: Randomness of the forward pass, for routers that use it.

  Returns:
    The stream, the caches (None without any) and the MoE sums by group and position, stacked
    over repeats (None for dense blocks); those of attention experts under `J.attention`.
  """
  new_caches, sums, depth = {}, {}, 0
  for s, group_params in params.items():
    here = None if caches is None else caches[s]
    state, (new_caches[s], sums[s]) = run_group(
      (s, graphs[s], depth), group_params, state, tokens, flow, here, keys
    )
    depth += jax.tree.leaves(group_params)[0].shape[0] * len(group_params)
  return state[0], None if caches is None else new_caches, sums


def run_group(
  group: tuple[str, dict[str, Any], int],
  params: dict[str, Any],
  state: tuple[jax.Array, Any],
  tokens: Tokens,
  flow: Flow,
  caches: dict[str, Any] | None = None,
  keys: Keys | None = None,
) -> tuple[tuple[jax.Array, Any], tuple[dict[str, Any], dict[str, Any]]]:
  """Runs the blocks of a layer group, or a run of them, over the stream.

  Args:
    group: Its name, graph definitions by position, and the depth of its first repeat.
    params: Leaves by position, stacked over repeats.
    state: As in `run_stack`, and so are the others.

  Returns:
    What the next group is handed; caches and MoE sums by position, stacked over repeats.
  """
  s, graphs, depth = group
  repeats = jax.tree.leaves(params)[0].shape[0]
  arrive = None if flow.arrive is None else functools.partial(flow.arrive, s)
  step = _group_step(s, graphs, tokens, keys, flow, None if flow.ahead else arrive)
  scans = flow.scan and repeats > 1
  if flow.ahead is not None:
    assert caches is None, "weights arrive ahead in training alone"
    step = functools.partial(_numbered, step, depth)
    return flow.ahead(step, arrive, state, params, not scans)
  inputs = (params, caches, depth + jnp.arange(repeats) * len(params))
  return (jax.lax.scan if scans else _unrolled)(step, state, inputs)


def _group_step(
  s: str,
  graphs: dict[str, Any],
  tokens: Tokens,
  keys: Keys | None,
  flow: Flow,
  arrive: Callable[[Any], Any] | None,
) -> Any:
  """Returns the body that runs a pattern once, as `lax.scan` wants it."""

  def step_of(given: tuple[Tokens, Keys | None], state: Any, inputs: Any) -> tuple[Any, Any]:
    (tokens, keys), (x_BLD, carry), (params, caches, index) = given, state, inputs
    new_caches, sums = {}, {}
    for j, block_params in (params if arrive is None else arrive(params)).items():
      block, depth = nnx.merge(graphs[j], block_params), index + int(j)
      cache = NoCache() if caches is None else caches[j]
      here = None if keys is None else keys.at(depth)
      x_BLD, carry, cache, found = block(x_BLD, carry, tokens.at(depth), cache, here)
      sums[j] = found.get("moe")
      if "attention" in found:
        sums[param_names.LayerAddress(s, j, param_names.ATTENTION).place] = found["attention"]
      new_caches[j] = None if caches is None else cache
    return (x_BLD, carry), (new_caches, sums)

  step = functools.partial(step_of, (tokens, keys))
  if flow.parts is not None:
    return functools.partial(_kept_in_parts(step_of, *flow.parts), (tokens, keys))
  if flow.remat == "none" and flow.keep is None:
    return step
  return jax.checkpoint(step, policy=flow.keep if flow.remat == "none" else POLICIES[flow.remat])


def _kept_in_parts(
  step: Any, split: Callable[[jax.Array], jax.Array], join: Callable[[jax.Array], jax.Array]
) -> Any:
  """Returns a step that is made again in the backward pass from a part of its stream.

  What a rule of differentiation needs in a scan is an argument: hence `given`, constants.
  """

  @jax.custom_vjp
  def again(given: Any, state: tuple[Any, Any], inputs: Any) -> tuple[Any, Any]:
    return step(given, state, inputs)

  def forward(given: Any, state: tuple[Any, Any], inputs: Any) -> tuple[Any, Any]:
    x_BLD, carry = state
    return step(given, state, inputs), (given, split(x_BLD), carry, inputs)

  def backward(kept: Any, cotangents: Any) -> Any:
    given, part, carry, inputs = kept
    return jax.vjp(step, given, (join(part), carry), inputs)[1](cotangents)

  again.defvjp(forward, backward)
  return again


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
