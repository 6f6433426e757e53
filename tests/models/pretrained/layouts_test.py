"""Models of every family train on two devices of each axis as on one."""

import functools

import jax
import numpy as np
import pytest

from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import Synthetic
from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.optim import AdamW, Constant, Optim
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.parity.fixture import LENGTH, ROWS, VOCAB, batch_of
from jaxmoe.train.experiment import Experiment, Train
from jaxmoe.train.step import abstract_batch, abstract_state, lower_step
from jaxmoe.train.train_state import StateSpec
from tests.models.pretrained.golden import FOLDER
from tests.models.pretrained.ours import Ours

STEPS, ALONE = 20, Parallel()


@functools.cache
def ours(family):
  return Ours(FOLDER / family)


@functools.cache
def losses(family, parallel=ALONE, micro=1):
  """Returns the mean loss of each of some steps from the weights of a family's golden file."""
  decoder = ours(family).decoder
  assert decoder.vocab_size == VOCAB
  experiment = Experiment(
    Data(parts=(MixturePart(Synthetic()),), seq_len=LENGTH),
    decoder.config,
    Optim(AdamW(), Constant(), learning_rate=3e-3),
    Train(num_steps=STEPS, batch_size=ROWS, num_micro=micro),
    parallel,
  )
  layout = make_layout(parallel)
  window = experiment.train.recovery.spike_window
  spec = StateSpec(decoder, experiment.transform(decoder), layout, window)
  given = abstract_state(spec), abstract_batch(experiment, layout)
  step = lower_step(experiment, decoder, spec, layout, *given).compile()
  copies = jax.tree.map(np.array, ours(family).params)  # the step takes what it is given
  state, found = spec.fresh(jax.device_put(copies, spec.shardings.params)), []
  for number in range(STEPS):
    state, metrics = step(state, layout.put_batch(batch_of(number % 4)))
    found.append(float(metrics["loss"].value))
  return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp", "expert", "tensor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_twenty_steps_are_those_of_one_device(family, axis):
  model = ours(family).decoder.config
  if axis == "expert" and not model.moe_records():
    pytest.skip("no experts")
  # What is drawn is drawn by token group, each of which is a microbatch of one device.
  draws = axis != "tensor" and any(layer.depends_on_shard for layer in model.moe_records())
  alone = losses(family, micro=2 if draws else 1)
  spread = losses(family, Parallel(**{axis: 2}))
  np.testing.assert_allclose(spread, alone, rtol=1e-5)
  assert alone[-4:].mean() < alone[:4].mean() - 0.05
