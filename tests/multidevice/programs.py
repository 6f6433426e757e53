"""Programs over a layout, lowered from shapes alone, for tests that read what is in them."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxmoe.core.backends import HERE
from jaxmoe.core.parallel_context import ParallelContext
from jaxmoe.core.rng import Keys
from jaxmoe.data.batches import NAMES
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import Synthetic
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.optim import AdamW, Constant, Optim
from jaxmoe.parallel import make_layout
from jaxmoe.train.experiment import Experiment, Train
from jaxmoe.train.sharded_gradients import context_of, sharded_gradients
from jaxmoe.train.step import abstract_batch, abstract_state, lower_step
from jaxmoe.train.train_state import StateSpec


def decoder_of(block, layers, dim, vocab_size, chooser=HERE, **settings):
  """Returns a model of so many of a block."""
  stack = (LayerGroup((block,), repeats=layers),)
  model = TransformerConfig(dim=dim, stack=stack, **settings)
  return Decoder(model, vocab_size, ParallelContext(chooser=chooser))


def lower_gradients(decoder, parallel, shape, micro=1):
  """Returns the lowered gradient program of a batch of that shape, and its mesh."""
  traced, mesh = trace_gradients(decoder, parallel, shape, micro)
  return traced.lower(), mesh


def trace_gradients(decoder, parallel, shape, micro=1):
  """Returns the same before it is lowered."""
  layout = make_layout(parallel)
  gradients = sharded_gradients(decoder, micro, context_of(decoder, parallel, layout))

  def put(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  lies = layout.shardings("params", decoder.dims, decoder.shapes)
  rows = NamedSharding(layout.mesh, layout.spec("activations", ("batch", "length")))
  batch = {name: put(jax.ShapeDtypeStruct(shape, jnp.int32), rows) for name in NAMES}
  root = jax.eval_shape(lambda: Keys.from_seed(0).root)
  run = jax.jit(lambda params, batch, root: gradients(params, batch, Keys(root)))
  return run.trace(jax.tree.map(put, decoder.shapes, lies), batch, root), layout.mesh


def compile_step(block, layers, dim, parallel, shape):
  """Returns the compiled training step with AdamW, its mesh, and the shapes of its state."""
  experiment = Experiment(
    Data(parts=(MixturePart(Synthetic()),), seq_len=shape[1]),
    TransformerConfig(dim=dim, stack=(LayerGroup((block,), repeats=layers),)),
    Optim(AdamW(), Constant()),
    Train(num_steps=10, batch_size=shape[0]),
    parallel,
  )
  decoder, layout = experiment.decoder(), make_layout(parallel)
  window = experiment.train.recovery.spike_window
  spec = StateSpec(decoder, experiment.transform(decoder), layout, window)
  given = abstract_state(spec), abstract_batch(experiment, layout)
  lowered = lower_step(experiment, decoder, spec, layout, *given)
  return lowered.compile(), layout.mesh, spec.shapes
