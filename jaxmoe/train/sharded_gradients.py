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
  layout, reducer, degrees = context.layout, context.grads, context.degrees
  assert layout is not None
  local = make_gradients(
    in_context(decoder, context), num_micro, compare=compare, reducer=reducer
  )
  params, grads = (
    jax.tree.map(lambda one: one.spec, layout.shardings(role, decoder.dims, decoder.shapes))
    for role in ("params", "grads")
  )
  columns = () if degrees.context == 1 else (degrees.axes.context,)
  whole, tokens = PartitionSpec(), PartitionSpec(degrees.row_axes, *columns)
  of_tokens = PartitionSpec(None, degrees.token_axes)

  def gradients(stored: Params, batch: Batch, keys: Keys) -> tuple[Params, Metrics, Statistics]:
    def on_device(
      stored: Params, batch: Batch, root: jax.Array
    ) -> tuple[Params, Metrics, Statistics]:
      return local(stored, batch, Keys(root, keys.path))

    return jax.shard_map(
      on_device, mesh=layout.mesh, in_specs=(params, tokens, whole),
      out_specs=(grads, whole, of_tokens), check_vma=False,
    )(stored, batch, keys.root)  # fmt: skip

  return gradients
