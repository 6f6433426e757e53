"""Six examples of `jaxmoe.nn` in models of flax.nnx that know nothing else of jaxmoe."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxmoe.nn
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.balance import LoadBalance, RouterZ
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.train.gradients import make_gradients

D, E, VOCAB = 8, 4, 11
CONFIG = MoEConfig(
  E, 2, experts=SwiGLU(mlp_dim=6), balance=(LoadBalance(weight=0.1), RouterZ(weight=0.01))
)


class Classifier(nnx.Module):
  """Anybody's MLP, one of whose layers is of experts."""

  def __init__(self, rngs):
    self.inner = nnx.Linear(3, D, rngs=rngs)
    self.moe = jaxmoe.nn.MoE(CONFIG, dim=D, rngs=rngs)
    self.outer = nnx.Linear(D, 2, rngs=rngs)

  def __call__(self, x):
    y, aux = self.moe(nnx.gelu(self.inner(x)))
    return self.outer(y), aux


def loss_of(model, x, labels):
  logits, aux = model(x)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean() + aux.loss, aux


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def first(tree):
  return jax.tree.map(lambda leaf: leaf[0], tree)


def loaded(module, params):
  state = nnx.state(module)
  nnx.replace_by_pure_dict(state, params)
  nnx.update(module, state)
  return module


def close(got, right):
  np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6 * float(np.max(np.abs(right))) + 1e-9)


def test_an_mlp_with_a_moe_layer_is_trained_by_optax():
  model, x = Classifier(nnx.Rngs(0)), draw(64, 3)
  labels = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    (loss, aux), grads = nnx.value_and_grad(loss_of, has_aux=True)(model, x, labels)
    optimizer.update(model, grads)
    return loss, aux

  losses = [step(model, optimizer)[0] for _ in range(60)]
  assert losses[-1] < 0.5 * losses[0]
  _, aux = step(model, optimizer)
  assert aux.load.shape == (E,) and np.isclose(aux.load.sum(), 1) and aux.dropped == 0
  assert aux.routing.expert_TA.shape == (64, 2) and aux.loss > 0


def test_over_a_mesh_its_gradients_are_those_of_one_device():
  model, x, labels = Classifier(nnx.Rngs(0)), draw(64, 3), jnp.arange(64) % 2
  alone = nnx.jit(nnx.grad(lambda model, x: loss_of(model, x, labels)[0]))(model, x)
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "expert"))
  jaxmoe.nn.shard(model, mesh, {"expert": "expert"})
  rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
  grads = nnx.jit(nnx.grad(lambda model, x: loss_of(model, x, labels)[0]))(model, rows)
  experts = nnx.to_pure_dict(nnx.state(model))["moe"]["layer"]["experts"]
  assert {leaf.addressable_shards[0].data.shape[0] for leaf in jax.tree.leaves(experts)} == {E // 2}
  jax.tree.map(close, nnx.to_pure_dict(grads), nnx.to_pure_dict(alone))


@pytest.fixture(scope="module")
def language_model():
  """Returns a decoder of one block, its parameters, rows of ids, and the gradient of its loss."""
  attention = SoftmaxAttention(num_heads=2, num_kv_heads=1, head_dim=4)
  stack = (LayerGroup((BlockConfig(attention, CONFIG),), 1),)
  decoder = Decoder(TransformerConfig(dim=D, stack=stack), VOCAB)
  params = decoder.init(Keys.from_seed(0))
  ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (3, 7)), jnp.int32)
  tokens = Tokens.of_ids(ids)
  batch = {"ids": ids, "labels": jnp.roll(ids, -1), "position": tokens.position,
           "segment": tokens.segment}  # fmt: skip
  grads, *_ = jax.jit(make_gradients(decoder, 1))(params, batch, Keys.from_seed(1))
  return decoder, params, batch, grads


def test_a_layer_in_a_foreign_model_has_the_gradients_of_the_layer_inside_ours(language_model):
  """The rest of the block is written out around it; both losses are the same function."""
  decoder, params, batch, grads = language_model
  block = loaded(jaxmoe.nn.Block(decoder.config.stack[0].pattern[0], dim=D, rngs=nnx.Rngs(0)),
                 {"layer": first(params["stack"]["0"]["0"])})  # fmt: skip
  moe = loaded(jaxmoe.nn.MoE(CONFIG, dim=D, rngs=nnx.Rngs(0)),
               {"layer": first(params["stack"]["0"]["0"]["moe"])})  # fmt: skip
  attention = jaxmoe.nn.Attention(decoder.config.stack[0].pattern[0].attention, dim=D,
                                  rngs=nnx.Rngs(0))  # fmt: skip
  attention = loaded(attention, {"layer": first(params["stack"]["0"]["0"]["attention"])})

  @nnx.jit
  @nnx.grad
  def of_loss(moe):
    x = decoder.embed(params, batch["ids"])
    x = x + attention(block.layer.attention_norm(x))[0]
    y, aux = moe(block.layer.ffn_norm(x))
    hidden = decoder.final_norm(params, x + y)
    return jnp.mean(decoder.nll(params, hidden, batch["labels"])) + aux.loss

  got = nnx.to_pure_dict(of_loss(moe))["layer"]
  right = first(grads["stack"]["0"]["0"]["moe"])
  for tree in (got, right):
    tree["router"].pop("buffers", None)
  jax.tree.map(close, got, right)


def test_a_block_and_a_whole_model_have_our_logits_and_gradients(language_model):
  decoder, params, batch, grads = language_model
  model = jaxmoe.nn.Transformer(decoder.config, VOCAB, rngs=nnx.Rngs(0))
  model.weights = loaded(model.weights, params)
  logits, aux = nnx.jit(lambda model: model(batch["ids"]))(model)
  np.testing.assert_array_equal(logits, jax.jit(decoder)(params, batch["ids"]))
  assert list(aux.layers) == ["layers/0/moe"]
  block = jaxmoe.nn.Block(decoder.config.stack[0].pattern[0], dim=D, rngs=nnx.Rngs(0))
  block = loaded(block, {"layer": first(params["stack"]["0"]["0"])})
  y, of_block = block(decoder.embed(params, batch["ids"]))
  close(decoder.logits(params, decoder.final_norm(params, y)), logits)
  close(of_block.loss, aux.loss)

  def loss(model):
    logits, aux = model(batch["ids"])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return nll.mean() + aux.loss

  got = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(model))["weights"]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, grads)


def test_a_bias_of_a_router_is_moved_by_its_rule_and_by_no_optimizer():
  config = dataclasses.replace(CONFIG, router=ROUTERS["aux_free"][1], balance=())
  moe, x = jaxmoe.nn.MoE(config, dim=D, rngs=nnx.Rngs(0)), draw(2, 16, D)
  buffers = jax.tree.leaves(nnx.state(moe, jaxmoe.nn.RouterBuffer))
  assert len(buffers) == 1 and not np.any(buffers[0])
  optimizer = nnx.Optimizer(moe, optax.adamw(1e-2, weight_decay=1.0), wrt=nnx.Param)

  @nnx.jit
  def step(moe, optimizer):
    def loss(moe):
      y, aux = moe(x)
      return jnp.mean(y**2) + aux.loss, aux

    grads, aux = nnx.grad(loss, has_aux=True)(moe)
    optimizer.update(moe, grads)
    moe.update_router(aux)
    return aux

  aux = step(moe, optimizer)
  (bias,) = jax.tree.leaves(nnx.state(moe, jaxmoe.nn.RouterBuffer))
  right = config.router.bias_rate * np.sign(np.mean(aux.load) - np.asarray(aux.load))
  np.testing.assert_allclose(bias, right - right.mean() if abs(bias.mean()) < 1e-9 else right)
  assert aux.loss == 0 and np.any(bias)


def test_a_router_alone_and_gates_that_hand_on_their_logits():
  """Tokens (T, D) are one row; padding is routed nowhere; noise needs `rngs`."""
  x, segment = draw(9, D), jnp.asarray([1] * 7 + [0] * 2)
  router = jaxmoe.nn.Router(dim=D, num_experts=E, num_active=2, rngs=nnx.Rngs(0))
  routing, _ = router(x, segment)
  scores = jax.nn.softmax(x @ router.gate_and_rule.gate.weight[...])
  np.testing.assert_array_equal(routing.expert_TA, np.argsort(-scores, axis=1)[:, :2])
  np.testing.assert_array_equal(routing.valid_TA.any(axis=1), segment > 0)
  handing = dataclasses.replace(CONFIG, router=ROUTERS["residual"][1])
  lower, upper = (jaxmoe.nn.MoE(handing, dim=D, rngs=nnx.Rngs(seed)) for seed in (0, 1))
  y, aux = lower(x, segment)
  assert aux.logits.shape == (9, E) and y.shape == x.shape and not np.any(y[7:])
  z, above = upper(y, segment, previous_logits=aux.logits)
  assert z.shape == x.shape and above.logits.shape == (9, E)
  noisy = jaxmoe.nn.Router(ROUTERS["noisy"][1], dim=D, num_experts=E, num_active=2,
                           rngs=nnx.Rngs(0))  # fmt: skip
  drawn = [noisy(x, rngs=nnx.Rngs(seed))[0].expert_TA for seed in (0, 0, 1)]
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert not np.array_equal(drawn[0], drawn[2])
  np.testing.assert_array_equal(noisy(x)[0].expert_TA, noisy(x)[0].expert_TA)
