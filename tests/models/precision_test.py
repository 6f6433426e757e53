import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MoEConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.dispatch import DISPATCHERS
from jaxmoe.moe.experts import SwiGLU

VOCAB, EXPERTS, ROWS, LENGTH = 11, 5, ([4, 3], [9]), 9
# What may round: moving, adding and multiplying activations. What may not: these.
CAREFUL = (
  "exp", "exp2", "log", "log1p", "logistic", "tanh", "rsqrt", "sqrt", "div", "integer_pow", "sin",
  "cos", "reduce_sum", "reduce_max", "cumsum", "cumlogsumexp", "top_k", "sort", "argmax",
)  # fmt: skip


def decoder(dtype, dispatch="dropless"):
  moe = MoEConfig(
    EXPERTS, 2, experts=SwiGLU(mlp_dim=6), dispatch=DISPATCHERS[dispatch][1], shared_mlp_dim=3
  )
  attention = SoftmaxAttention(4, 2, 4, qk_norm="head")
  segment = LayerGroup((BlockConfig(attention, moe),), 2)
  return Decoder(TransformerConfig(dim=8, stack=(segment,), dtype=dtype), VOCAB)


def run_of(model):
  def run(params, batch):
    hidden, _, sums = model.hidden(params, Tokens.of_batch(batch))
    nll = model.nll(params, hidden, batch["labels"])
    return hidden, model.logits(params, hidden), nll, sums

  return run


def equations(jaxpr):
  """Yields every equation, those inside of calls, loops and branches included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
      if is_jaxpr(value):
        yield from equations(getattr(value, "jaxpr", value))


def is_jaxpr(value):
  return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def dtypes(variables):
  return {variable.aval.dtype for variable in variables if hasattr(variable.aval, "dtype")}


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_in_bfloat16_router_softmax_norms_and_loss_stay_float32(dispatch, batch_of):
  model, batch = decoder("bfloat16", dispatch), batch_of(ROWS, LENGTH, VOCAB)
  closed = jax.make_jaxpr(run_of(model))(model.shapes, batch)
  found = list(equations(closed.jaxpr))
  careful = [equation for equation in found if equation.primitive.name in CAREFUL]
  assert {"exp", "log", "top_k", "rsqrt"} <= {equation.primitive.name for equation in careful}
  for equation in careful:
    assert jnp.bfloat16 not in dtypes(equation.invars), equation
  products = [equation for equation in found if equation.primitive.name == "dot_general"]
  assert any(dtypes(product.invars) == {jnp.dtype(jnp.bfloat16)} for product in products)
  for product in products:
    # Whatever goes in, sums are float32.
    assert dtypes(product.outvars) == {jnp.dtype(jnp.float32)}, product
  gates = [product for product in products if product.outvars[0].aval.shape[-1] == EXPERTS]
  heads = [product for product in products if product.outvars[0].aval.shape[-1] == VOCAB]
  for product in (*gates, *heads):
    assert dtypes(product.invars) == {jnp.dtype(jnp.float32)}
  assert gates and heads


@pytest.fixture(scope="module")
def both(batch_of):
  """For each dtype (outputs, gradients of the loss), and which tokens are valid."""
  batch, found = batch_of(ROWS, LENGTH, VOCAB), {}
  params = decoder("float32").init(Keys.from_seed(0))
  for dtype in ("float32", "bfloat16"):
    run = run_of(decoder(dtype))

    def loss(params, run=run):
      outputs = run(params, batch)
      return jnp.sum(outputs[2]), outputs

    (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    found[dtype] = outputs, grads
  return found, batch["segment"] > 0


def test_bfloat16_is_close_to_float32_on_medians_and_keeps_float32_outputs(both):
  found, valid = both
  _, logits, nll, _ = found["float32"][0]
  hidden, *rough = found["bfloat16"][0]
  assert hidden.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(rough)} == {jnp.dtype(jnp.float32)}
  distance = np.abs(np.asarray(rough[0]) - np.asarray(logits))[valid]
  assert 0 < np.median(distance) < 2e-2
  assert np.median(np.abs(np.asarray(rough[1]) - np.asarray(nll))[valid]) < 2e-2


def test_gradients_of_float32_parameters_are_float32_and_close_on_medians(both):
  found, _ = both
  grads = {dtype: jax.tree.leaves(found[dtype][1]) for dtype in found}
  assert {leaf.dtype for leaf in grads["bfloat16"]} == {jnp.dtype(jnp.float32)}
  right, rough = (np.concatenate([np.ravel(leaf) for leaf in grads[dtype]]) for dtype in found)
  used = right != 0
  size = np.sqrt(np.mean(right[used] ** 2))
  assert np.median(np.abs(rough - right)[used]) < 2e-2 * size


def test_bfloat16_weights_kept_in_float32_give_the_same_outputs_bit_for_bit(batch_of):
  model, batch = decoder("bfloat16"), batch_of(ROWS, LENGTH, VOCAB)
  wide = jax.tree.map(
    lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), model.init(Keys.from_seed(0))
  )
  narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
  mixed = {**wide, "stack": narrow["stack"]}
  run = jax.jit(run_of(model))
  right = jax.tree.leaves(run(wide, batch)[:3])
  for params in (narrow, mixed):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(run(params, batch)[:3]), right)


def test_files_hold_the_dtype_that_is_asked_for():
  config = TransformerConfig(dim=8, stack=decoder("float32").config.stack, param_dtype="bfloat16")
  shapes = Decoder(config, VOCAB).shapes
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}
