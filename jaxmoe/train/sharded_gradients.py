"""The gradient of a step over the devices of a layout: the one-device program on each, by hand.

`shard_map` runs `make_gradients` on every device for its rows of the batch and its parts of the
parameters; the collectives are lines of `parallel/` and `moe/dispatch`. What is outside, optimizer
and buffers, is a program over whole arrays that the compiler spreads.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from jaxmoe.core.layout import Layout
from jaxmoe.core.parallel_context import ParallelContext
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Compare
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.parallel import MeshContext, Parallel, ParamGatherer, ReduceScatter
from jaxmoe.train.gradients import Batch, Gradients, Metrics, Statistics, make_gradients
from jaxmoe.train.pipeline_gradients import PipelineGradients
from jaxmoe.train.pipeline_stages import stages_of, table_of


def context_of(decoder: Decoder, parallel: Parallel, layout: Layout) -> ParallelContext:
  """Returns the context in which a model runs: one device, or each device of a mesh.

  Args:
    decoder: The functions of the whole model.
    parallel: The degrees.
    layout: `make_layout` of them; parameters and gradients lie as it says.
  """
  chooser = decoder.parallel.chooser
  if parallel.num_devices == 1:
    return ParallelContext(chooser=chooser, layout=layout)
  of = (parallel, layout, decoder.dims, decoder.shapes)
  chooser = chooser.of_devices(layout.mesh.devices.flat)
  return MeshContext(
    parallel, ParamGatherer(*of), ReduceScatter(*of), chooser=chooser, layout=layout
  )


def in_context(decoder: Decoder, context: ParallelContext) -> Decoder:
  """Returns the functions of a model as one device of a context runs them."""
  return Decoder(decoder.config, decoder.vocab_size, context, decoder.layer_groups)


def sharded_gradients(
  decoder: Decoder, num_micro: int, context: ParallelContext, compare: Compare | None = None
) -> Gradients:
  """Returns `make_gradients` over the devices of a context.

  Args:
    decoder: The model on one device.
    num_micro: Microbatches; each device splits its own rows.
    context: `context_of` the model.
    compare: What is compared between domains.

  Returns:
    The function from global arrays to global arrays; on one device, what `make_gradients` returns.
  """
  if not isinstance(context, MeshContext):
    return make_gradients(decoder, num_micro, compare=compare)
  layout, degrees = context.layout, context.degrees
  assert layout is not None
  local = _on_device(decoder, num_micro, context, compare)
  params, grads_spec = (
    jax.tree.map(lambda one: one.spec, layout.shardings(role, decoder.dims, decoder.shapes))
    for role in ("params", "grads")
  )
  columns = () if degrees.context == 1 else (degrees.axes.context,)
  whole, tokens = PartitionSpec(), PartitionSpec(degrees.row_axes, *columns)
  of_metrics = {"layers": PartitionSpec(context.stage_axis), "rest": whole}
  of_tokens = PartitionSpec(context.stage_axis, degrees.token_axes)
  apart = context.stage_axis is not None

  def gradients(stored: Params, batch: Batch, keys: Keys) -> tuple[Params, Metrics, Statistics]:
    def on_device(
      stored: Params, batch: Batch, root: jax.Array
    ) -> tuple[Params, Metrics, Statistics]:
      grads, metrics, statistics = local(stored, batch, Keys(root, keys.path))
      if apart:  # a stage has sums of its own layers
        metrics = {"layers": metrics.pop("layers"), "rest": metrics}
      return grads, metrics, statistics

    grads, metrics, statistics = jax.shard_map(
      on_device, mesh=layout.mesh, in_specs=(params, tokens, whole),
      out_specs=(grads_spec, of_metrics if apart else whole, of_tokens), check_vma=False,
    )(stored, batch, keys.root)  # fmt: skip
    if apart:
      metrics = {**metrics["rest"], "layers": metrics["layers"]}
    return grads, metrics, statistics

  return gradients


def _on_device(
  decoder: Decoder, num_micro: int, context: MeshContext, compare: Compare | None
) -> Gradients:
  """Returns what each device does: the program of one device, or of a stage of a pipeline."""
  here, reducer, degrees = in_context(decoder, context), context.grads, context.degrees
  if context.stage_axis is None:
    return make_gradients(here, num_micro, compare=compare, reducer=reducer)
  assert reducer is not None
  table = table_of(degrees, num_micro)
  stages = stages_of(degrees, decoder.config, decoder.vocab_size)
  axis, keep = context.stage_axis, degrees.keep
  return PipelineGradients(here, table, stages, axis, reducer, compare, keep)
