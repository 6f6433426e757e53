"""Stages of a pipeline find what one device does, whatever their layers and however these lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.rng import Keys
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.attention_experts import AttentionExperts
from jaxmoe.models.block import BlockConfig, MLPConfig, MoEConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.balance import LoadBalance, RouterZ
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.parallel.pipelines import Vocabulary, with_vocabulary, write_table
from jaxmoe.parallel.pipelines.csv_notation import parse_table
from jaxmoe.parity.cells import AGAIN
from jaxmoe.train.gradients import make_gradients
from jaxmoe.train.pipeline_stages import placed_groups
from jaxmoe.train.sharded_gradients import context_of, sharded_gradients

VOCAB, MICRO, LENGTH = 13, 4, 6
ROWS = ([4, 2], [6], [3, 1], [5], [2, 2], [], [1], [6])
BALANCE = (
  LoadBalance(0.5, "global"), LoadBalance(0.3, "micro"), LoadBalance(0.2, "global_running"),
  LoadBalance(0.2, "sequence"), RouterZ(0.1),
)  # fmt: skip
SOFTMAX = SoftmaxAttention(2, 1, 4)


def block(router="topk", attention=SOFTMAX):
  moe = MoEConfig(4, 2, ROUTERS[router][1], SwiGLU(mlp_dim=4), balance=BALANCE)
  return BlockConfig(attention, moe)


DENSE = BlockConfig(SOFTMAX, MLPConfig(6))
MODELS = {
  "a dense layer first, then patterns whose gates hand on logits": TransformerConfig(
    dim=8, tied=True, embed_scale=2.0,
    stack=(LayerGroup((DENSE,), 1), LayerGroup((block("residual"), DENSE), 3)),
  ),
  "routers with buffers of every token": TransformerConfig(
    dim=8, remat="full", stack=(LayerGroup((block("aux_free"), block("quantile")), 3),)
  ),
  "noise, experts in attention, a head with a bias": TransformerConfig(
    dim=8, scan=False, head_bias=True, norm="layer", logit_scale=0.5,
    stack=(LayerGroup((block("noisy", AttentionExperts(3, 2, SOFTMAX)),), 5),),
  ),
}  # fmt: skip


SPREAD_AGAIN = write_table(with_vocabulary(parse_table(AGAIN, "again"), Vocabulary(2)))


def cases():
  """Yields models with degrees; all but the first three are slow."""
  first, second, third = MODELS
  yield first, Parallel(pipe=3)
  yield first, Parallel(pipe=3, head="one_barrier")  # a tied table of 13 rows for 3 devices
  yield first, Parallel(pipe=3, keep="residuals")
  for name, parallel in (
    (second, Parallel(pipe=2, pipeline=AGAIN)),
    (first, Parallel(pipe=2, pipeline=SPREAD_AGAIN, head="one_barrier")),
    (second, Parallel(pipe=2, keep="residuals")),
    (third, Parallel(pipe=4, keep="residuals", pipeline="gpipe")),
    (third, Parallel(pipe=2, keep="residuals", pipeline="dualpipe_v")),
    (first, Parallel(pipe=3, keep="residuals", pipeline="zb_h1")),
    (second, Parallel(pipe=2, keep="residuals", pipeline="v_half", head="one_barrier")),
    (third, Parallel(pipe=2, keep="residuals", tensor=2, head="two_barriers")),
    (first, Parallel(pipe=2, pipeline="gpipe", stages=(1, 6))),
    (first, Parallel(pipe=3, stages=(2, 1, 4))),
    (second, Parallel(pipe=2)),
    (second, Parallel(pipe=4, pipeline="gpipe")),
    (first, Parallel(pipe=3, pipeline="zb_h1")),
    (third, Parallel(pipe=2, pipeline="dualpipe_v")),
    (third, Parallel(pipe=2)),
    (third, Parallel(pipe=4)),
    (first, Parallel(pipe=2, tensor=2, head="two_barriers")),
    (second, Parallel(pipe=2, pipeline="v_half", head="one_barrier")),
    (third, Parallel(pipe=2, tensor=2, head="one_barrier")),
    (third, Parallel(pipe=4, pipeline="zb_h1", head="two_barriers")),
  ):
    yield pytest.param(name, parallel, marks=pytest.mark.slow)


def named(tree, decoder):
  return param_names.unstack(param_names.flatten(tree), decoder.layer_groups)


def placed(params, plain, decoder):
  flat = param_names.stack(
    named(params, plain), list(param_names.flatten(decoder.shapes)), decoder.layer_groups
  )
  return param_names.unflatten(decoder.shapes, flat)


def close(found, true, what, limit=1e-6):
  assert found.keys() == true.keys(), what
  scale = np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(true)))
  for path, leaf in true.items():
    np.testing.assert_allclose(
      found[path], leaf, rtol=1e-5, atol=limit * (1 + scale), err_msg=f"{what} {path}"
    )


@pytest.mark.parametrize("name, parallel", list(cases()))
def test_gradients_metrics_sums_and_statistics_are_those_of_one_device(name, parallel, batch_of):
  config = MODELS[name]
  plain = Decoder(config, VOCAB)
  decoder = Decoder(config, VOCAB, layer_groups=placed_groups(parallel, config, VOCAB))
  params = jax.tree.map(lambda leaf: leaf * 1.5, plain.init(Keys.from_seed(0)))
  batch = {key: jnp.asarray(of) for key, of in batch_of(ROWS, LENGTH, VOCAB).items()}
  layout, groups = make_layout(parallel), parallel.num_row_groups
  lies = layout.shardings("params", decoder.dims, decoder.shapes)
  context = context_of(decoder, parallel, layout)

  def of(gradients, params, batch):
    run = jax.jit(lambda *given: gradients(*given, Keys.from_seed(5)))
    return jax.device_get(run(params, batch))

  true = of(make_gradients(plain, MICRO, groups), params, batch)
  spread = sharded_gradients(decoder, MICRO, context)
  mine = jax.device_put(placed(params, plain, decoder), lies)
  found = of(spread, mine, layout.put_batch(jax.device_get(batch)))
  limit = 1e-6 if parallel.tensor == 1 else 2e-6  # sums of heads on two devices, with either head
  close(named(found[0], decoder), named(true[0], plain), "gradient", limit)
  plain_metrics, metrics = true[1], found[1]
  for part in (param_names.MOE, param_names.ATTENTION):
    sums = (
      param_names.flatten(param_names.by_layer(of["layers"], groups, part))
      for of, groups in ((metrics, decoder.layer_groups), (plain_metrics, plain.layer_groups))
    )
    close(*sums, f"sums of {part}")
  rest = ({k: v for k, v in of.items() if k != "layers"} for of in (metrics, plain_metrics))
  close(*map(param_names.flatten, rest), "metric")
  if groups == 1:  # else microbatches are of other rows
    tables = (
      param_names.flatten(param_names.by_layer(of, groups))
      for of, groups in ((found[2], decoder.layer_groups), (true[2], plain.layer_groups))
    )
    close(*tables, "statistics")
