"""A check for large activations that a layout replicates, before anything compiles.

Over `tensor` the residual stream is the same without `sequence`, and so are the rows of experts
whose hidden units are spread over it; an exchange by all-gather gives every device the rows of
all. That is fine while they are small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import Layout
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.data.batches import NAMES
from jaxmoe.models.block import BlockConfig, MoEConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, Params, TransformerConfig
from jaxmoe.moe.dispatch import AllGather, AllToAll
from jaxmoe.parallel import GIB, Replicated, Varying, find_replicated, make_layout
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.sharded_gradients import context_of, in_context


def replicated_activations(
  experiment: Experiment, decoder: Decoder, layout: Layout
) -> tuple[Replicated, ...]:
  """Returns the activations of a forward pass that devices hold alike, the largest first.

  Traced from shapes, for one microbatch of one device. The backward pass is not looked at, nor what
  is kept for it. Stages of a pipeline hold those of their own layers: all layers are looked at.

  Args:
    experiment: The recipe.
    decoder: Its model.
    layout: `make_layout` of its degrees.
  """
  parallel, train = experiment.parallel, experiment.train
  if parallel.pipe > 1:
    parallel = dataclasses.replace(parallel, pipe=1, stages=(), head="last", keep="input")
    decoder = Decoder(decoder.config, decoder.vocab_size, decoder.parallel)
    layout = make_layout(parallel, list(layout.mesh.devices.flat)[: parallel.num_devices])
  if parallel.num_devices == 1:
    return ()
  here = in_context(decoder, context_of(decoder, parallel, layout))
  shardings = layout.shardings("params", decoder.dims, decoder.shapes)
  kept = experiment.masters(decoder).shapes(decoder.shapes, decoder.layer_groups)
  stored = jax.tree.map(_part, kept, shardings)
  rows = train.batch_size // (parallel.num_row_groups * train.num_micro)
  tokens = jax.ShapeDtypeStruct((rows, experiment.data.seq_len // parallel.context), jnp.int32)
  batch = dict.fromkeys(NAMES, tokens)

  def forward(stored: Params, batch: dict[str, jax.Array], root: jax.Array) -> Any:
    params = here.parallel.gather_params(stored)
    known = here.parallel.spread_rows(Tokens.of_batch(batch))
    hidden_BLD, _, sums = here.hidden(params, known, keys=Keys(root))
    return here.nll(params, hidden_BLD, batch["labels"]), sums

  axes = list(layout.mesh.shape.items())
  root = jax.eval_shape(lambda: jax.random.key(0))
  program = jax.make_jaxpr(forward, axis_env=axes)(stored, batch, root)
  of_rows = Varying(frozenset(parallel.token_axes), of_batch=True)
  given = [Varying(_axes(sharding)) for sharding in jax.tree.leaves(shardings)]
  given += [of_rows for _ in jax.tree.leaves(batch)]
  return find_replicated(program, [*given, Varying()], dict(axes))


def check_replication(
  experiment: Experiment, decoder: Decoder, layout: Layout
) -> tuple[Replicated, ...]:
  """Returns `replicated_activations`, the largest of which may have `parallel.max_replicated_gib`.

  Raises:
    InputError: it has more: which, how large, and what would work, in one line.
  """
  limit = experiment.parallel.max_replicated_gib
  found = replicated_activations(experiment, decoder, layout)
  if not found or found[0].bytes <= limit * GIB:
    return found
  largest = found[0]
  works = _what_works(experiment, layout) or "make batches or sequences shorter"
  raise InputError(
    f"{largest.too_large(layout.degree(largest.axes), limit)}; {works}, or set "
    "parallel.max_replicated_gib higher"
  )


def _what_works(experiment: Experiment, layout: Layout) -> str | None:
  """Returns the first change after which no copy is too large."""
  limit, devices = experiment.parallel.max_replicated_gib * GIB, list(layout.mesh.devices.flat)
  for change, changed in _changes(experiment):
    spread = make_layout(changed.parallel, devices)
    found = replicated_activations(changed, changed.decoder(), spread)
    if not found or found[0].bytes <= limit:
      return change
  return None


def _changes(experiment: Experiment) -> Iterator[tuple[str, Experiment]]:
  """Yields changes that a recipe allows, and the changed recipes: of layouts, then of batches."""
  parallel, train = experiment.parallel, experiment.train
  spread = {"sequence": True, "partition_activations": False}
  folded = {"fold": (*parallel.fold, "tensor")}
  fold = f"parallel.fold={','.join(folded['fold'])}"
  options: list[tuple[str, str, dict[str, Any]]] = [
    ("exchange=all_to_all", "model", {"stack": _sending(experiment.model)}),
    ("parallel.sequence=true", "parallel", spread),
    (fold, "parallel", folded),
    (f"parallel.sequence=true and {fold}", "parallel", {**spread, **folded}),
  ]
  rows = train.batch_size // parallel.num_row_groups
  options += [
    (f"train.num_micro={number}", "train", {"num_micro": number})
    for number in range(train.num_micro + 1, rows + 1) if rows % number == 0
  ]  # fmt: skip
  for words, part, fields in options:
    try:
      changed = dataclasses.replace(getattr(experiment, part), **fields)
      yield f"set {words}", dataclasses.replace(experiment, **{part: changed})
    except InputError:
      continue


def _sending(model: TransformerConfig) -> tuple[LayerGroup, ...]:
  """Returns the layer groups of a model with all-to-alls in place of all-gathers."""

  def sending(block: BlockConfig) -> BlockConfig:
    ffn = block.ffn
    if not (isinstance(ffn, MoEConfig) and isinstance(ffn.exchange, AllGather)):
      return block
    return dataclasses.replace(block, ffn=dataclasses.replace(ffn, exchange=AllToAll()))

  return tuple(
    dataclasses.replace(group, pattern=tuple(map(sending, group.pattern))) for group in model.stack
  )


def _part(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
  """Returns the shape of what one device has of a leaf."""
  return jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)


def _axes(sharding: NamedSharding) -> frozenset[str]:
  """Returns the mesh axes an array lies on."""
  parts = ((part,) if isinstance(part, str) else part or () for part in sharding.spec)
  return frozenset(axis for part in parts for axis in part)
