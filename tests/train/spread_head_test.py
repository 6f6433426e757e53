"""S and T of a head over several devices find what float64 sums over the whole vocabulary find."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.loss_pieces import LossPieces
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.parallel.pipelines import Vocabulary
from jaxmoe.train.pipeline_stages import placed_groups
from jaxmoe.train.sharded_gradients import context_of, in_context
from jaxmoe.train.spread_head import SpreadHead

DIM, LENGTH, LABELS, EPS = 6, 5, 7.0, 1e-6
STACK = (LayerGroup((BlockConfig(SoftmaxAttention(2, 2, 2), MLPConfig(4)),), 3),)
PLAIN = TransformerConfig(dim=DIM, stack=STACK)
HEADS = {
  "its own weight": PLAIN,
  "a bias and a scale": dataclasses.replace(PLAIN, head_bias=True, logit_scale=0.5),
  "the embedding": dataclasses.replace(PLAIN, tied=True),
}
DEGREES = ({"pipe": 3}, {"pipe": 2, "tensor": 2})
SIZES = (12, 13)  # one divides by the devices, of one the last device has less
HEAD_OF = {1: "two_barriers", 2: "one_barrier"}


def by_hand(params, config, x_TD, labels_T):
  """Returns the loss and its gradients, by loops over tokens in float64."""
  x_TD, scale_D = np.float64(x_TD), np.float64(params["final_norm"]["scale"])
  tied = config.tied
  table = params["embed"]["table"] if tied else np.transpose(params["head"]["weight"])
  weight_VD = np.float64(table)
  bias_V = np.float64(params["head"]["bias"]) if config.head_bias else np.zeros(len(weight_VD))
  loss, d_x, d_scale = 0.0, np.zeros_like(x_TD), np.zeros_like(scale_D)
  d_weight, d_bias = np.zeros_like(weight_VD), np.zeros_like(bias_V)
  for at, label in enumerate(labels_T):
    if label < 0:
      continue
    root = np.sqrt(np.mean(x_TD[at] ** 2) + EPS)
    normal_D = x_TD[at] / root
    logits_V = (weight_VD @ (normal_D * scale_D)) * (config.logit_scale or 1.0) + bias_V
    odds_V = np.exp(logits_V - logits_V.max())
    odds_V /= odds_V.sum()
    loss -= np.log(odds_V[label]) / LABELS
    d_logits_V = (odds_V - np.eye(len(odds_V))[label]) / LABELS
    d_bias += d_logits_V
    d_logits_V = d_logits_V * (config.logit_scale or 1.0)
    d_weight += np.outer(d_logits_V, normal_D * scale_D)
    d_hidden_D = d_logits_V @ weight_VD
    d_scale += d_hidden_D * normal_D
    d_normal_D = d_hidden_D * scale_D
    d_x[at] = (d_normal_D - normal_D * np.mean(d_normal_D * normal_D)) / root
  grads = {"final_norm/scale": d_scale}
  grads["embed/table" if tied else "head/weight"] = d_weight if tied else d_weight.T
  if config.head_bias:
    grads["head/bias"] = d_bias
  return loss, d_x, grads


def spread(config, size, parallel, algorithm):
  """Returns the head over these degrees' devices, its layout, and parameters."""
  decoder = Decoder(config, size, layer_groups=placed_groups(parallel, config, size))
  layout = make_layout(parallel)
  context = context_of(decoder, parallel, layout)
  here = in_context(decoder, context)
  share = parallel.pipe * parallel.tensor
  head = SpreadHead(LossPieces(here), Vocabulary(algorithm), "pipe", parallel.pipe - 1, share)
  params = jax.tree.map(lambda leaf: leaf * 2 + 0.3, decoder.init(Keys.from_seed(1)))
  return head, layout, decoder, params, context


def passes(head, layout, decoder, params, context, x_BLD, labels_BL):
  """Returns what S and T find together: loss, gradient of the input, of parameters."""
  lies = layout.shardings("params", decoder.dims, decoder.shapes)
  names = [name for name in ("embed", "final_norm", "head") if name in params]
  specs = {name: jax.tree.map(lambda one: one.spec, lies[name]) for name in names}
  reduced = {
    name: jax.tree.map(lambda one: one.spec, of[name])
    for of in [layout.shardings("grads", decoder.dims, decoder.shapes)]
    for name in names
  }
  whole = PartitionSpec()

  def on_device(params, x_BLD, labels_BL):
    mine = jax.lax.axis_index("pipe") == head.device
    handed = (jnp.where(mine, x_BLD, jnp.nan), None)  # of others nothing is to be read
    outer = head.outer(params)
    nll, left, early, d_early = head.forward(outer, handed, labels_BL, jnp.float32(LABELS))
    late, d_late = head.backward(outer, left, handed, labels_BL, jnp.float32(LABELS))
    grads = jax.tree.map(jnp.zeros_like, {name: params[name] for name in names})
    for found in (early, late):
      for name, leaves in found.items():
        for leaf, of in leaves.items():
          grads[name][leaf] += of
    d_x = sum(of[0] for of in (d_early, d_late) if of is not None)
    d_x = jax.lax.psum(jnp.where(mine, d_x, 0), "pipe")
    return nll.sum / LABELS, context.psum_tensor(d_x), context.grads.finalize(
      context.grads.per_microbatch(grads)
    )

  run = jax.shard_map(
    on_device, mesh=layout.mesh, in_specs=(specs, whole, whole),
    out_specs=(whole, whole, reduced), check_vma=False,
  )  # fmt: skip
  return jax.device_get(jax.jit(run)({name: params[name] for name in names}, x_BLD, labels_BL))


@pytest.mark.parametrize("algorithm", HEAD_OF)
@pytest.mark.parametrize("degrees", DEGREES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_both_passes_together_are_a_float64_loop(name, degrees, algorithm):
  config = HEADS[name]
  for size in SIZES:
    parallel = Parallel(**degrees, head=HEAD_OF[algorithm])
    head, layout, decoder, params, context = spread(config, size, parallel, algorithm)
    rng = np.random.default_rng(size)
    x_BLD = rng.normal(size=(1, LENGTH, DIM)).astype(np.float32)
    labels_BL = np.array([[size - 1, 0, -1, size // 2, 3]], np.int32)
    found = passes(head, layout, decoder, params, context, x_BLD, labels_BL)
    loss, d_x, grads = by_hand(jax.device_get(params), config, x_BLD[0], labels_BL[0])
    np.testing.assert_allclose(found[0], loss, rtol=1e-6)
    np.testing.assert_allclose(found[1][0], d_x, rtol=1e-5, atol=1e-6)
    assert {f"{part}/{leaf}" for part in found[2] for leaf in found[2][part]} >= grads.keys()
    for path, true in grads.items():
      part, leaf = path.split("/")
      np.testing.assert_allclose(found[2][part][leaf], true, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_the_first_stage_takes_rows_of_the_whole_embedding_and_gives_their_gradient(degrees):
  parallel = Parallel(**degrees, head="one_barrier")
  head, layout, decoder, params, context = spread(PLAIN, 13, parallel, 2)
  specs = jax.tree.map(
    lambda one: one.spec, layout.shardings("params", decoder.dims, decoder.shapes)["embed"]
  )
  ids_BL = np.array([[12, 0, 5, 5, 1]], np.int32)
  slots = np.arange(5, dtype=np.int32)[None]
  batch = {"ids": ids_BL, "segment": np.ones_like(ids_BL), "position": slots}
  d_x = np.random.default_rng(0).normal(size=(1, LENGTH, DIM)).astype(np.float32)

  def on_device(table, d_x):
    tokens = Tokens.of_batch(jax.tree.map(jnp.asarray, batch))
    mine = jnp.where(jax.lax.axis_index("pipe") == 0, d_x, 0) / parallel.tensor
    found = head.unembed({"embed": table}, tokens, (mine, None))
    return head.embed({"embed": table}, tokens)[0], context.grads.finalize(
      context.grads.per_microbatch(found)
    )["embed"]

  whole = PartitionSpec()
  run = jax.shard_map(
    on_device, mesh=layout.mesh, in_specs=(specs, whole), out_specs=(whole, specs), check_vma=False
  )
  x_BLD, grads = jax.device_get(jax.jit(run)(params["embed"], d_x))
  table_VD = np.asarray(params["embed"]["table"])
  assert np.array_equal(x_BLD[0], table_VD[ids_BL[0]])
  true_VD = np.zeros_like(table_VD)
  for at, token in enumerate(ids_BL[0]):
    true_VD[token] += d_x[0, at]
  np.testing.assert_allclose(grads["table"], true_VD, rtol=1e-6)
