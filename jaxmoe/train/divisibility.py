"""Divisibility of a model and its batch by parallel degrees, said before anything compiles."""

from __future__ import annotations

from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.models.attention_experts import AttentionExperts
from jaxmoe.models.block import MLPConfig, MoEConfig
from jaxmoe.models.latent_attention import LatentAttention
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.dispatch import AllToAll
from jaxmoe.moe.dispatch.capacity import Limited
from jaxmoe.parallel import Parallel
from jaxmoe.train.context_rules import check_context
from jaxmoe.train.pipeline_stages import stages_of, table_of

MOST_COUNTED = 2**31 - 1


def check_divisibility(
  parallel: Parallel, model: TransformerConfig, batch_size: int, num_micro: int, seq_len: int
) -> None:
  """Refuses what cannot be spread as asked.

  Raises:
    InputError: what, why and what would work, in one line.
  """
  tokens = batch_size * seq_len // (parallel.num_token_groups * num_micro)
  experts = max((moe.num_experts for moe in model.moe_records()), default=1)
  if tokens * experts > MOST_COUNTED:
    raise InputError(
      f"a device has {tokens:,} tokens of a microbatch (train.batch_size, data.seq_len) to send to "
      f"{experts:,} experts, and counts are of 32 bits: their product may be {MOST_COUNTED:,} at "
      "most; lower the batch, or raise train.num_micro"
    )
  if parallel.num_devices == 1:
    return
  check_context(parallel, model, seq_len)
  if parallel.pipe > 1:
    table_of(parallel, num_micro)
    stages_of(parallel, model, vocab_size=0)
  _divides(
    batch_size, parallel.num_row_groups * num_micro, "train.batch_size",
    "data * fsdp * expert * num_micro, for every device has as many rows of a microbatch",
  )
  if parallel.partition_activations and model.remat != "full":
    raise InputError(
      "partition_activations=true is about what is kept of layers that are made again whole: "
      f"model.remat={model.remat}; set model.remat=full, or partition_activations=false"
    )
  if parallel.sequence or parallel.partition_activations or _splits(parallel):
    _divides(
      seq_len, parallel.context * parallel.tensor, "data.seq_len",
      "context * tensor, over which sequences are spread",
    )
  for group in model.stack:
    for block in group.pattern:
      _check_attention(block.attention, parallel.tensor)
      if isinstance(block.ffn, MoEConfig):
        _check_experts(block.ffn, parallel)
      elif isinstance(block.ffn, MLPConfig):
        _divides(block.ffn.mlp_dim, parallel.tensor, "mlp_dim of a dense layer", "tensor")


def _check_attention(attention: Any, tensor: int) -> None:
  if tensor == 1:
    return
  if isinstance(attention, AttentionExperts):
    raise InputError(
      f"attention experts are not spread over tensor devices: {tensor=}; set tensor=1"
    )
  _divides(attention.num_heads, tensor, "num_heads", "tensor")
  if isinstance(attention, LatentAttention):  # latents have no heads
    return
  heads = attention.num_kv_heads
  if heads % tensor and tensor % heads:
    raise InputError(
      f"num_kv_heads must divide by tensor or divide it: num_kv_heads={heads}, {tensor=}; "
      "change one"
    )


def _check_experts(layer: MoEConfig, parallel: Parallel) -> None:
  if parallel.tensor > 1:
    _divides(layer.shared_mlp_dim, parallel.tensor, "shared_mlp_dim", "tensor")
    folds = "tensor" in parallel.fold
    mlp_dim = None if folds else getattr(layer.experts, "mlp_dim", None)
    if mlp_dim is not None and not layer.experts.mixed:
      _divides(mlp_dim, parallel.tensor, "mlp_dim of experts", "tensor, or set fold=(tensor,)")
  degree = parallel.expert_degree
  if degree == 1:
    return
  if not layer.experts.mixed:
    _divides(layer.num_experts, degree, "num_experts", "the product of expert and folded degrees")
  for name, value in (("num_inactive", layer.num_inactive), ("placement", layer.placement)):
    if value:
      raise InputError(
        f"{name} is not offered with experts spread over {degree} devices: {name}={value}; "
        "set expert=1 and fold=()"
      )
  if _splits(parallel) and isinstance(layer.dispatch, Limited):
    raise InputError(
      "capacity is counted over a device's tokens, which with fold=tensor are a part of a row: "
      f"{type(layer.dispatch).__name__}; set dispatch=dropless, or leave tensor out of fold"
    )
  axes = [axis for axis in parallel.expert_axes if parallel.axis_sizes[axis] > 1]
  if isinstance(layer.exchange, AllToAll) and layer.exchange.two_level and len(axes) < 2:
    raise InputError(
      f"two levels need experts over two axes of several devices: {axes}; fold another axis, "
      "or set two_level=false"
    )


def _splits(parallel: Parallel) -> bool:
  """Whether devices of a tensor group share the tokens among them for the experts."""
  return "tensor" in parallel.fold and parallel.tensor > 1


def _divides(size: int, degree: int, what: str, of: str) -> None:
  if size % degree:
    below = size - size % degree
    near = f"{below} or {below + degree}" if below else f"{degree}"
    raise InputError(
      f"{what} must be a multiple of {degree}, {of}: {what}={size}; set it to {near}"
    )
