"""The cells of rows that are spread over context devices: strategies, orders, masks, and axes."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterator
from typing import Any

from jaxmoe.models.block import ATTENTION
from jaxmoe.models.masks import MASKS
from jaxmoe.moe.dispatch import DISPATCHERS
from jaxmoe.moe.dispatch.capacity import Limited
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.parallel import Parallel
from jaxmoe.parallel.attend import ATTEND
from jaxmoe.parallel.block_order import Order
from jaxmoe.parallel.pipelines import PIPELINES

Components = dict[str, str]
"""Names of components by field of a cell."""
OTHERS = ("data", "fsdp", "expert", "tensor")
_ALONE, _BESIDE = Parallel(context=4), Parallel(context=2)


def context_cells() -> Iterator[tuple[Parallel, Components]]:
  """Yields the layouts over context and what is tried with each."""
  yield from ((layout, {}) for layout in _layouts())
  yield from stage_cells()
  for attention, attend in itertools.product(ATTENTION, ATTEND):
    if not (attend == "ulysses" and attention == "latent"):  # latents are one head
      yield dataclasses.replace(_ALONE, attend=attend), {"attention": attention}  # type: ignore
  for attention in ATTENTION:
    if attention != "experts":
      yield Parallel(context=2, tensor=2, attend="ring"), {"attention": attention}
  for mask, attend in itertools.product(MASKS, ATTEND):
    yield dataclasses.replace(_ALONE, attend=attend), {"mask": mask}  # type: ignore
  for attention in ("stick_breaking", "latent"):
    yield dataclasses.replace(_ALONE, attend="ring"), {"mask": "window", "attention": attention}
  ring = dataclasses.replace(_BESIDE, attend="ring")
  for router, (_, rule) in ROUTERS.items():
    if rule.depends_on != "batch":
      yield ring, {"router": router}
  with_experts = Parallel(context=2, expert=2, attend="ring")
  for dispatch, (kind, _) in DISPATCHERS.items():
    if not issubclass(kind, Limited):
      yield with_experts, {"dispatch": dispatch}
  yield with_experts, {"exchange": "all_gather"}


def stage_cells() -> Iterator[tuple[Parallel, Components]]:
  """Yields the layouts over context and stages, and what is tried with each."""
  for attend in ATTEND:
    yield Parallel(pipe=2, context=2, attend=attend), {}  # type: ignore
  for pipeline in PIPELINES:
    yield Parallel(pipe=2, context=2, attend="ring", pipeline=pipeline), {}
  for size in (1, 2):
    for axes in itertools.combinations(OTHERS, size):
      yield Parallel(pipe=2, context=2, attend="ring", **dict.fromkeys(axes, 2)), {}  # type: ignore
  yield Parallel(pipe=2, context=2, attend="ring", order="zigzag"), {}
  for attention in ("latent", "stick_breaking", "binary_linear"):
    yield Parallel(pipe=2, context=2, attend="ring"), {"attention": attention}


def _layouts() -> Iterator[Parallel]:
  """Yields every set of context and up to three other axes, with strategies and variants."""
  for attend in ATTEND:
    each: dict[str, Any] = {"attend": attend}
    yield dataclasses.replace(_ALONE, **each)
    yield from (Parallel(context=2, **each, **{axis: 2}) for axis in OTHERS)  # type: ignore
    for order in typing.get_args(Order):
      yield dataclasses.replace(_ALONE, **each, order=order)  # type: ignore
  for size in (2, 3):
    for axes in itertools.combinations(OTHERS, size):
      yield Parallel(context=2, attend="ring", **dict.fromkeys(axes, 2))  # type: ignore
  for zero in (0, 1, 2):
    yield Parallel(context=2, fsdp=2, zero=zero, attend="ring")  # type: ignore
  for axis in ("expert", "fsdp", "tensor"):
    yield Parallel(context=2, attend="ring", order="zigzag", **{axis: 2})  # type: ignore
  for attend in ("ring", "ulysses"):
    yield Parallel(context=2, tensor=2, sequence=True, attend=attend)  # type: ignore
  yield Parallel(context=2, tensor=2, partition_activations=True, attend="ring")
  yield Parallel(context=2, expert=2, fold=("context",), attend="ring")
  yield Parallel(context=2, expert=2, tensor=2, fold=("tensor",), attend="ring")
