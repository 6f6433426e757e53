"""Bytes of a pipeline's slots on one device, by what its stages could keep; from shapes alone."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.layout import Layout
from jaxmoe.core.rng import Keys
from jaxmoe.data.batches import NAMES
from jaxmoe.models.transformer import Decoder
from jaxmoe.parallel import MeshContext
from jaxmoe.parallel.pipelines import Keep
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.pipeline_gradients import PipelineGradients
from jaxmoe.train.pipeline_stages import stages_of, table_of
from jaxmoe.train.sharded_gradients import context_of, in_context


def slot_bytes(
  experiment: Experiment, decoder: Decoder, layout: Layout
) -> dict[Keep, dict[str, int]]:
  """Returns bytes by pool for each choice of `parallel.keep`; none without a pipeline.

  Slots of a head over all devices are left out: they are the same with either.

  Args:
    experiment: The recipe.
    decoder: Its model, placed over its stages.
    layout: `make_layout` of its degrees.
  """
  if experiment.parallel.pipe == 1:
    return {}
  choices: tuple[Keep, ...] = typing.get_args(Keep)
  return {keep: _of_choice(experiment, decoder, layout, keep) for keep in choices}


def _of_choice(
  experiment: Experiment, decoder: Decoder, layout: Layout, keep: Keep
) -> dict[str, int]:
  parallel, train = dataclasses.replace(experiment.parallel, keep=keep), experiment.train
  context = context_of(decoder, parallel, layout)
  assert isinstance(context, MeshContext) and context.stage_axis and context.grads
  here, axis = in_context(decoder, context), context.stage_axis
  table = table_of(parallel, train.num_micro)
  stages = stages_of(parallel, decoder.config, decoder.vocab_size)
  gradients = PipelineGradients(here, table, stages, axis, context.grads, None, keep)
  kept = experiment.masters(decoder).shapes(decoder.shapes, decoder.layer_groups)
  stored = jax.tree.map(
    lambda leaf, lies: jax.ShapeDtypeStruct(lies.shard_shape(leaf.shape), leaf.dtype),
    kept, layout.shardings("params", decoder.dims, decoder.shapes),
  )  # fmt: skip
  rows, length = train.batch_size // parallel.num_row_groups, experiment.data.seq_len
  tokens = jax.ShapeDtypeStruct((rows, length // parallel.context), jnp.int32)
  found: dict[str, int] = {}

  def traced(stored: Any, batch: Any, root: jax.Array) -> None:
    step, slots = gradients.step_of(stored, batch, Keys(root)), gradients.columns.slots
    message = _bytes(step.message())
    found["inputs"], found["grads"] = slots.inputs * message, slots.grads * message
    found["kept"] = slots.kept * _bytes(step.kept_slot().shapes())
    found["deferred"] = slots.deferred * _bytes(step.deferred_slot().shapes())

  root = jax.eval_shape(lambda: jax.random.key(0))
  axes = list(layout.mesh.shape.items())
  jax.make_jaxpr(traced, axis_env=axes)(stored, dict.fromkeys(NAMES, tokens), root)
  return found


def _bytes(tree: Any) -> int:
  return sum(math.prod(of.shape) * of.dtype.itemsize for of in jax.tree.leaves(tree))
