"""The gradient of a step over the devices of a layout: the one-device program on each, by hand.

`shard_map` runs `make_gradients` on every device for its rows of the batch and its parts of the
parameters; the collectives are lines of `parallel/` and `moe/dispatch`. What is outside, optimizer
and buffers, is a program over whole arrays that the compiler spreads.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from jaxmoe.core.layout import Layout
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Compare
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.parallel import MeshContext, Parallel, ParamGatherer, ReduceScatter
from jaxmoe.train.gradients import Batch, Gradients, Metrics, Statistics, make_gradients


def on_one_device(
  decoder: Decoder, parallel: Parallel, layout: Layout
) -> tuple[Decoder, ReduceScatter]:
  """Returns the functions of a model as one device of a layout runs them, inside `shard_map`.

  Args:
    decoder: Those of the whole model.
    parallel: The degrees.
    layout: `make_layout` of them.

  Returns:
    The functions, and how gradients are summed over devices.
  """
  of = (parallel, layout, decoder.dims, decoder.shapes)
  chooser = decoder.parallel.chooser.of_devices(layout.mesh.devices.flat)
  context = MeshContext(parallel, ParamGatherer(*of), chooser=chooser)
  here = Decoder(decoder.config, decoder.vocab_size, context)
  return here, ReduceScatter(*of)


def sharded_gradients(
  decoder: Decoder,
  num_micro: int,
  parallel: Parallel,
  layout: Layout,
  compare: Compare | None = None,
) -> Gradients:
  """Returns `make_gradients` over the layout's devices.

  Args:
    decoder: The model on one device.
    num_micro: Microbatches; each device splits its own rows.
    parallel: The degrees.
    layout: `make_layout` of them; parameters and gradients lie as it says.
    compare: What is compared between domains.

  Returns:
    The function from global arrays to global arrays; on one device, what `make_gradients` returns.
  """
  if parallel.num_devices == 1:
    return make_gradients(decoder, num_micro, compare=compare)
  here, reducer = on_one_device(decoder, parallel, layout)
  local = make_gradients(here, num_micro, compare=compare, reducer=reducer)
  params, grads = (
    jax.tree.map(lambda one: one.spec, layout.shardings(role, decoder.dims, decoder.shapes))
    for role in ("params", "grads")
  )
  whole, tokens = PartitionSpec(), PartitionSpec(parallel.token_axes)
  of_tokens = PartitionSpec(None, parallel.token_axes)

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
