"""Rules that rows spread over context devices set a model, said before anything compiles."""

from __future__ import annotations

from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.models.binary_linear_attention import BinaryLinear
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.latent_attention import LatentAttention
from jaxmoe.models.stick_breaking_attention import StickBreaking
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.dispatch.capacity import Limited
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.parallel import Parallel


def check_context(parallel: Parallel, model: TransformerConfig, seq_len: int) -> None:
  """Refuses rows that cannot be cut, and layers that must see whole rows.

  Raises:
    InputError: what, why and what would work, in one line.
  """
  parts = 2 * parallel.context
  if parallel.context == 1:
    return
  if seq_len % parts:
    near = f"{seq_len - seq_len % parts} or {seq_len - seq_len % parts + parts}"
    raise InputError(
      f"data.seq_len must be a multiple of {parts}, 2 * context, for rows are cut into so many "
      f"blocks: data.seq_len={seq_len}; set it to {near if seq_len > parts else parts}"
    )
  for group in model.stack:
    for block in group.pattern:
      _check_attention(getattr(block.attention, "heads", block.attention), block, parallel)
      if isinstance(block.ffn, MoEConfig):
        _check_layer(block.ffn, parallel.context)


def _check_attention(attention: Any, block: BlockConfig, parallel: Parallel) -> None:
  name, attend, order = type(attention).__name__, parallel.attend, parallel.order
  if isinstance(attention, BinaryLinear) and order != "plain":
    raise InputError(
      "linear attention hands its state from stretch to stretch of a row: "
      f"{order=}; set order=plain"
    )
  if isinstance(attention, StickBreaking) and order != "plain" and attend in ("ring", "token_ring"):
    raise InputError(
      f"{name} takes nearer keys first, which come mixed in this order: {attend=}, {order=}; set "
      "order=plain, or attend=gather or ulysses"
    )
  if attend == "ulysses" and not isinstance(attention, BinaryLinear):
    _check_heads(attention, block, parallel)


def _check_heads(attention: Any, block: BlockConfig, parallel: Parallel) -> None:
  """Refuses heads that cannot be shared out over context devices."""
  if isinstance(attention, LatentAttention):
    raise InputError(
      "ulysses shares out heads, and the latents of latent attention are one: attend='ulysses'; "
      "set attend=ring, token_ring or gather"
    )
  context, active = parallel.context, getattr(block.attention, "num_active", 1)
  heads = attention.num_heads * active // parallel.tensor
  keys = max(1, attention.num_kv_heads // parallel.tensor)
  if heads % context or (keys % context and context % keys):
    raise InputError(
      f"ulysses shares out {heads} query heads and {keys} key heads of a device over {context} "
      f"context devices: the query heads must divide by {context}, the key heads divide by it or "
      "divide it; change num_heads or num_kv_heads, or set attend=ring, token_ring or gather"
    )


def _check_layer(layer: MoEConfig, context: int) -> None:
  if isinstance(layer.dispatch, Limited):
    raise InputError(
      "capacity is counted over a device's tokens, which with context are a part of a row: "
      f"{type(layer.dispatch).__name__}, {context=}; set dispatch=dropless, or context=1"
    )
  if layer.router.depends_on == "batch":
    raise InputError(
      "a router that looks at a whole batch sees a part of each row with context: "
      f"{type(layer.router).__name__}, {context=}; set a router that goes token by token, or "
      "context=1"
    )
  if layer.exchange.depends_on_shard:
    raise InputError(
      "an exchange whose buffers are bounded drops by a device's tokens, which with context are a "
      f"part of a row: {type(layer.exchange).__name__}, {context=}; set bound=none, or context=1"
    )
