"""A stack of blocks: patterns that repeat, run by scan or layer by layer over the same leaves.

`Stack((Segment((Block(ffn=MLP()),)), Segment((local, full), repeats=12)))` is one dense layer
followed by 24 that alternate. In memory, leaf `stack/s/j/...` holds the j-th block of segment s for
all repeats, stacked in dim 0; `core/names.py` gives each layer its own name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core import names
from jaxmoe.core.errors import InputError
from jaxmoe.core.names import Splits
from jaxmoe.core.parameters import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.ways import ONE_DEVICE, Ways
from jaxmoe.models.block import Block
from jaxmoe.models.cache import Fresh
from jaxmoe.models.stream import Stream

Remat = Literal["none", "full", "dots"]
POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@dataclasses.dataclass(frozen=True)
class Segment:
  """A pattern of blocks, repeated."""

  pattern: tuple[Block, ...] = (Block(),)
  repeats: int = 2

  def __post_init__(self) -> None:
    if self.repeats < 1:
      raise InputError(f"repeats must be at least 1: repeats={self.repeats}")
    if not self.pattern:
      raise InputError("a pattern needs at least one block")


class Stack:
  """The functions of a stack: it holds graph definitions and no arrays."""

  def __init__(self, segments: tuple[Segment, ...], stream: Stream, ways: Ways = ONE_DEVICE):
    self.segments, self.stream, self.ways = segments, stream, ways

  @property
  def splits(self) -> Splits:
    """How layers are grouped in memory, for `core/names.py`."""
    return tuple((len(segment.pattern), segment.repeats) for segment in self.segments)

  def layer_indices(self, segment: int, position: int) -> list[int]:
    """Returns the depth of each repeat of one block of a pattern."""
    first = sum(blocks * repeats for blocks, repeats in self.splits[:segment])
    blocks, repeats = self.splits[segment]
    return [first + repeat * blocks + position for repeat in range(repeats)]

  def modules(self, init: Init) -> dict[str, dict[str, nnx.State]]:
    """Returns the leaves, stacked over repeats; a layer's draw depends on its depth alone."""

    def make(block: Block, layer: jax.Array) -> nnx.State:
      return nnx.state(block.build(init.at(layer) / "layer", self.stream))

    return {
      str(s): {
        str(j): jax.vmap(lambda layer, block=block: make(block, layer))(
          jnp.array(self.layer_indices(s, j))
        )
        for j, block in enumerate(segment.pattern)
      }
      for s, segment in enumerate(self.segments)
    }

  def graphs(self, init: Init) -> dict[str, dict[str, Any]]:
    """Returns the graph definition of each block of each pattern."""
    return {
      str(s): {
        str(j): nnx.graphdef(
          nnx.eval_shape(lambda b=block: b.build(init, self.stream, self.ways))
        )
        for j, block in enumerate(segment.pattern)
      }
      for s, segment in enumerate(self.segments)
    }


@dataclasses.dataclass(frozen=True)
class Flow:
  """How a stack is run.

  Attributes:
    scan: By `lax.scan`, or unrolled.
    remat: What the backward pass makes again.
    arrive: Makes the weights of one block ready, from segment, position and stored leaves; None
      where they are ready as they are stored.
    keep: The remat policy in place of keeping all, for weights that are not to be kept.
  """

  scan: bool = True
  remat: Remat = "none"
  arrive: Callable[[str, str, Any], Any] | None = None
  keep: Callable[..., bool] | None = None


def run_stack(
  graphs: dict[str, dict[str, Any]],
  params: dict[str, dict[str, Any]],
  x_BLD: jax.Array,
  tokens: Tokens,
  flow: Flow,
  caches: dict[str, dict[str, Any]] | None = None,
  keys: Keys | None = None,
  carry: Any = None,
) -> tuple[jax.Array, Any, Any]:
  """Runs every block over the stream.

  Args:
    graphs: Graph definitions by segment and position.
    params: Leaves by segment and position, stacked over repeats.
    x_BLD: The stream.
    tokens: What is known of each token.
    flow: Scan or not, remat or not.
    caches: Caches by segment and position, stacked over repeats; None to attend afresh.
    keys: Randomness of the forward pass, for routers that use it.
    carry: What the first block is handed by the gates of earlier ones.

  Returns:
    The stream, the caches (None without any) and the MoE sums by segment and position, stacked
    over repeats (None for dense blocks); those of attention experts under `J.attention`.
  """
  new_caches, sums, depth = {}, {}, 0
  for s, segment_params in params.items():
    repeats = jax.tree.leaves(segment_params)[0].shape[0]
    indices = depth + jnp.arange(repeats) * len(segment_params)
    step = _segment_step(s, graphs[s], tokens, keys, flow)
    inputs = (segment_params, None if caches is None else caches[s], indices)
    loop = jax.lax.scan if flow.scan and repeats > 1 else _unrolled
    (x_BLD, carry), (new_caches[s], sums[s]) = loop(step, (x_BLD, carry), inputs)
    depth += repeats * len(segment_params)
  return x_BLD, None if caches is None else new_caches, sums


def _segment_step(
  segment: str, graphs: dict[str, Any], tokens: Tokens, keys: Keys | None, flow: Flow
) -> Any:
  """Returns the body that runs a pattern once, as `lax.scan` wants it."""

  def step(state: tuple[Any, Any], inputs: Any) -> tuple[Any, Any]:
    (x_BLD, carry), (params, caches, index) = state, inputs
    new_caches, sums = {}, {}
    for j, block_params in params.items():
      if flow.arrive is not None:
        block_params = flow.arrive(segment, j, block_params)
      block, depth = nnx.merge(graphs[j], block_params), index + int(j)
      cache = Fresh() if caches is None else caches[j]
      here = None if keys is None else keys.at(depth)
      x_BLD, carry, cache, found = block(x_BLD, carry, tokens.at(depth), cache, here)
      sums[j] = found.get("moe")
      if "attention" in found:
        sums[j + names.ATTENTION] = found["attention"]
      new_caches[j] = None if caches is None else cache
    return (x_BLD, carry), (new_caches, sums)

  if flow.remat == "none" and flow.keep is None:
    return step
  return jax.checkpoint(step, policy=flow.keep if flow.remat == "none" else POLICIES[flow.remat])


def _unrolled(step: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
  """Does what `lax.scan(step, state, inputs)` does, one iteration after the other."""
  repeats = jax.tree.leaves(inputs)[0].shape[0]
  outputs = []
  for repeat in range(repeats):
    state, output = step(state, jax.tree.map(lambda leaf, r=repeat: leaf[r], inputs))
    outputs.append(output)
  return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
