"""The Layout of a recipe's degrees: where parameters, gradients, moments and batches lie.

Experts lie over the expert axes; heads, hidden units and the vocabulary over `tensor` (Megatron's
column and row pairs), the vocabulary over `pipe`, too, where `head` says so; by its stage ZeRO
(Rajbhandari et al. 2019) spreads moments (1), gradients (2) and parameters (3) over `fsdp`, each
leaf along its largest dim that is free and divides. Layers lie over `pipe`, in the order and with
the empty places that `parallel/stages.py` gives them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import EXPERT, LAYER, Layout, Role, Rules
from jaxmoe.parallel.block_order import order_batch
from jaxmoe.parallel.degrees import Parallel, make_mesh

VOCAB = "vocab"
TENSOR_DIMS = ("heads", "kv_heads", "mlp", VOCAB)
UNEVEN = ("kv_heads", VOCAB)
"""Dims that are kept whole and cut where they are used if they do not divide by `tensor`."""


def make_layout(parallel: Parallel, devices: Sequence[jax.Device] | None = None) -> Layout:
  """Returns the Layout of `parallel` over the devices of all processes, or over the first of them.

  Raises:
    InputError: as `make_mesh`.
  """
  tensor = dict.fromkeys(TENSOR_DIMS, (parallel.axes.tensor,))
  weights: Rules = {**tensor, VOCAB: parallel.vocab_axes, EXPERT: parallel.expert_axes}
  if parallel.pipe > 1:
    weights = {**weights, LAYER: (parallel.axes.pipe,)}
  stages: dict[Role, int] = {"optimizer": 1, "grads": 1, "params": 3}
  stages = {role: stage for role, stage in stages.items() if parallel.zero >= stage}
  context = parallel.axes.context
  length: Rules = {"length": (context,)} if parallel.context > 1 else {}
  sharded = dict.fromkeys(stages if parallel.fsdp > 1 else (), (parallel.axes.fsdp,))
  return Layout(
    make_mesh(parallel, devices),
    rules={
      "params": weights,
      "grads": weights,
      "optimizer": weights,
      "activations": {"batch": parallel.row_axes, **length},
    },
    sharded=sharded,
    may_replicate=frozenset((*UNEVEN, EXPERT)),
    order_columns=_order(parallel),
  )


def _order(parallel: Parallel) -> Any:
  """Returns what puts a batch's columns in the order of context devices; None in order of time."""
  if parallel.context == 1 or parallel.order == "plain":
    return None
  return functools.partial(order_batch, context=parallel.context, order=parallel.order)


def share_of_rows(layout: Layout, batch_size: int) -> tuple[int, int]:
  """Returns (index, count): this process holds part `index` of `count` equal parts of the rows.

  Processes whose devices see the same tokens hold the same part.

  Raises:
    InputError: the rows do not divide by the devices they lie on.
  """
  sharding = layout.sharding("activations", ("batch",), (batch_size,))
  here = sharding.addressable_devices_indices_map((batch_size,)).values()
  bounds = {index[0].indices(batch_size)[:2] for index in here if index is not None}
  start, stop = min(a for a, _ in bounds), max(b for _, b in bounds)
  size = stop - start
  if sum(b - a for a, b in bounds) != size or batch_size % size or start % size:
    raise InputError(
      "the devices of a process hold rows that are not one even part of the batch; let the "
      "product of data, fsdp and expert be a multiple of the number of processes, or divide it"
    )
  return start // size, batch_size // size
