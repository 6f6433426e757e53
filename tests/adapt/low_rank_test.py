import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.adapt.low_rank import LowRank, add_low_rank, merge_low_rank
from jaxmoe.core import param_names
from jaxmoe.core.backends import Devices, Need
from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weight_formats import dot
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig, MoEConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.dispatch.plan import Ragged, Uniform
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.ops.grouped_matmul import BACKENDS

ATTENTION = SoftmaxAttention(num_heads=4, num_kv_heads=2, head_dim=4)
MIXED = MoEConfig(5, 2, experts=SwiGLU(mlp_dim=6), shared_mlp_dim=6)
RANK, SCALE = 2, 0.5
HERE = [name for name, each in BACKENDS.items() if each.fits(Need(Devices("cpu"))) is None]
MATRICES = ("*/table", "*/attention/?", "*/gate_up", "*/down", "*/gate/weight")
B, L, VOCAB = 2, 7, 11
# Every einsum that models and layers call `dot` with: (spec, shape of x, shape of the weight,
# where left ends and right begins).
SPECS = {
  "queries": ("bld,dnh->blnh", (2, 3, 4), (4, 5, 6), 1),
  "attention out": ("blnh,nhd->bld", (2, 3, 5, 6), (5, 6, 4), 2),
  "gate": ("td,de->te", (7, 4), (4, 5), 1),
  "dense in": ("...d,dgf->...gf", (2, 3, 4), (4, 2, 5), 1),
  "dense out": ("...f,fd->...d", (2, 3, 5), (5, 4), 1),
  "head": ("td,dv->tv", (7, 4), (4, 9), 1),
  "tied head": ("td,vd->tv", (7, 4), (9, 4), 1),
}


def decoder(tied=True, repeats=2):
  pattern = (BlockConfig(ATTENTION, MIXED),)
  return Decoder(TransformerConfig(dim=8, stack=(LayerGroup(pattern, repeats),), tied=tied), VOCAB)


def normal(seed, shape):
  return np.random.default_rng(seed).normal(size=shape)


def low_rank(seed, shape, split, copies=0, rank=RANK):
  """Returns a LowRank with a random update and the float64 dense weight it stands for."""
  lead, left, right = shape[:copies], shape[copies:split], shape[split:]
  base, a = normal(seed, shape), normal(seed + 1, (*lead, *left, rank))
  b = normal(seed + 2, (*lead, rank, *right))
  product = a.reshape(*lead, -1, rank) @ b.reshape(*lead, rank, -1)
  arrays = (jnp.asarray(part, jnp.float32) for part in (base, a, b))
  return LowRank(*arrays, SCALE), base + SCALE * product.reshape(shape)


def project(weight, grad):
  """Returns the gradients of a and b that the gradient of the dense weight implies."""
  copies = weight.a.ndim + weight.b.ndim - 2 - weight.base.ndim
  lead, rank = weight.a.shape[:copies], weight.a.shape[-1]
  a = np.asarray(weight.a, np.float64).reshape(*lead, -1, rank)
  b = np.asarray(weight.b, np.float64).reshape(*lead, rank, -1)
  grad = np.asarray(grad, np.float64).reshape(*lead, a.shape[-2], b.shape[-1])
  grad_a = weight.scale * grad @ np.swapaxes(b, -1, -2)
  grad_b = weight.scale * np.swapaxes(a, -1, -2) @ grad
  return grad_a.reshape(weight.a.shape), grad_b.reshape(weight.b.shape)


def close(got, right):
  """Asserts float32 equality with a floor for entries whose true value is next to zero."""
  right = np.asarray(right, np.float64)
  np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6 * max(1, np.abs(right).max()))


@pytest.fixture(scope="module")
def model():
  """A tiny tied model with every kind of leaf, and one function that runs it either way."""
  model = decoder()
  ids = jax.random.randint(jax.random.key(1), (B, L), 0, VOCAB)
  labels = jnp.roll(ids, -1, axis=1).at[:, -1].set(-1)
  tokens = Tokens.of_ids(ids)

  @jax.jit
  def run(params):
    def loss(params):
      hidden, _, _ = model.hidden(params, tokens)
      return model.nll(params, hidden, labels).sum(), model.logits(params, hidden)

    (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, grads

  return model, model.init(Keys.from_seed(0)), run


def with_updates(params):
  """Returns the tree with every b drawn at random, so that the update counts."""

  def draw(path, leaf):
    is_b = getattr(path[-1], "name", None) == "b"
    return jnp.asarray(normal(len(str(path)), leaf.shape) * 0.3, leaf.dtype) if is_b else leaf

  return jax.tree_util.tree_map_with_path(draw, params)


@pytest.mark.parametrize("spec, x_shape, shape, split", SPECS.values(), ids=SPECS.keys())
def test_each_product_and_its_gradients_equal_those_of_the_dense_weight(
  spec, x_shape, shape, split
):
  weight, dense = low_rank(0, shape, split)
  x = normal(9, x_shape)
  out, vjp = jax.vjp(lambda w, x: dot(w, x, spec), weight, jnp.asarray(x, jnp.float32))
  grad_out = normal(8, out.shape)
  grads, grad_x = vjp(jnp.asarray(grad_out, jnp.float32))
  close(out, np.einsum(spec, x, dense))
  left, out_letters = spec.split("->")
  x_letters, w_letters = left.split(",")
  close(grad_x, np.einsum(f"{out_letters},{w_letters}->{x_letters}", grad_out, dense))
  flat_x, flat_out = x_letters.replace("...", "xy"), out_letters.replace("...", "xy")
  grad_dense = np.einsum(f"{flat_x},{flat_out}->{w_letters}", x, grad_out)
  for got, right in zip((grads.a, grads.b), project(weight, grad_dense), strict=True):
    close(got, right)
  np.testing.assert_array_equal(grads.base, 0)


@pytest.mark.parametrize("name", ["uniform", *HERE])
def test_the_grouped_product_and_its_gradients_equal_those_of_the_dense_weight(name):
  sizes = np.array([4, 4, 4] if name == "uniform" else [5, 0, 7])
  weight, dense = low_rank(3, (3, 4, 2, 5), 2, copies=1)
  rows, grad_out = normal(7, (12, 4)), normal(6, (12, 2, 5))
  groups = Uniform(sizes, 4) if name == "uniform" else Ragged(jnp.asarray(sizes), BACKENDS[name])
  run = lambda weight, rows: weight.grouped_dot(rows, groups)  # noqa: E731
  out, vjp = jax.vjp(run, weight, jnp.asarray(rows, jnp.float32))
  grads, grad_rows = vjp(jnp.asarray(grad_out, jnp.float32))
  slot = np.repeat(np.arange(3), sizes)
  close(out, np.einsum("rd,rdgf->rgf", rows, dense[slot]))
  close(grad_rows, np.einsum("rgf,rdgf->rd", grad_out, dense[slot]))
  grad_dense = np.zeros_like(dense)
  np.add.at(grad_dense, slot, np.einsum("rd,rgf->rdgf", rows, grad_out))
  for got, right in zip((grads.a, grads.b), project(weight, grad_dense), strict=True):
    close(got, right)


def test_rows_of_a_table_equal_those_of_the_dense_weight_and_outside_is_nan():
  weight, dense = low_rank(5, (9, 4), 1)
  rows = weight.rows(jnp.array([[0, 8, 3], [3, 9, 1000]]), jnp.float32)
  close(rows[0], dense[[0, 8, 3]])
  assert np.isnan(rows[1, 1:]).all() and not np.isnan(rows[1, 0]).any()


def test_gradients_equal_finite_differences():
  weight, _ = low_rank(0, (4, 3), 1)
  x = normal(1, (5, 4))

  def value(a, b):
    return np.sum(np.sin(x @ (np.asarray(weight.base, np.float64) + SCALE * a @ b)))

  a, b = np.asarray(weight.a, np.float64), np.asarray(weight.b, np.float64)
  loss = lambda w: jnp.sum(jnp.sin(dot(w, jnp.asarray(x, jnp.float32), "td,de->te")))  # noqa: E731
  grads = jax.grad(loss)(weight)
  for got, at, run in (
    (grads.a, a, lambda part: value(part, b)),
    (grads.b, b, lambda part: value(a, part)),
  ):
    for index in np.ndindex(at.shape):
      step = np.zeros_like(at)
      step[index] = 1e-6
      right = (run(at + step) - run(at - step)) / 2e-6
      np.testing.assert_allclose(got[index], right, rtol=1e-5, atol=1e-5)


def test_a_zero_update_of_every_kind_of_leaf_leaves_the_outputs_as_they_are(model):
  decoder, params, run = model
  swapped = add_low_rank(decoder, params, MATRICES, RANK, SCALE, Keys.from_seed(1))
  is_low_rank = lambda leaf: isinstance(leaf, LowRank)  # noqa: E731
  kinds = jax.tree.leaves(swapped, is_leaf=is_low_rank)
  assert sum(map(is_low_rank, kinds)) == 1 + 4 + 5
  logits, grads = run(params)
  swapped_logits, swapped_grads = run(swapped)
  # XLA may merge products of one operand, x W and x A, whose sums then round otherwise.
  np.testing.assert_allclose(swapped_logits, logits, rtol=1e-5, atol=1e-5)
  # With b = 0 nothing flows to a, and b gets its share at once.
  for path, grad in param_names.flatten(swapped_grads).items():
    if path.endswith(("/base", "/a")):
      np.testing.assert_array_equal(grad, 0, err_msg=path)
    elif path.endswith("/b"):
      assert np.abs(grad).max() > 0, path
  scales = {
    path: grad for path, grad in param_names.flatten(grads).items() if path.endswith("scale")
  }
  for path, grad in scales.items():
    close(param_names.flatten(swapped_grads)[path], grad)


def test_gradients_in_a_model_are_those_of_the_merged_weights_projected(model):
  decoder, params, run = model
  swapped = with_updates(add_low_rank(decoder, params, MATRICES, RANK, SCALE, Keys.from_seed(1)))
  merged = merge_low_rank(swapped)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  logits, grads = run(merged)
  swapped_logits, swapped_grads = run(swapped)
  np.testing.assert_allclose(swapped_logits, logits, rtol=1e-5, atol=1e-5)
  assert np.abs(logits - run(params)[0]).max() > 0.1, "the updates do nothing"
  size = max(np.abs(grad).max() for grad in jax.tree.leaves(grads))
  is_low_rank = lambda leaf: isinstance(leaf, LowRank)  # noqa: E731
  formats, treedef = jax.tree.flatten(swapped, is_leaf=is_low_rank)
  found = treedef.flatten_up_to(swapped_grads)
  for weight, got, dense in zip(formats, found, treedef.flatten_up_to(grads), strict=True):
    if not is_low_rank(weight):
      continue
    for part, right in zip((got.a, got.b), project(weight, dense), strict=True):
      # Sums over tokens in another order, through two factors instead of one.
      np.testing.assert_allclose(part, right, rtol=1e-4, atol=1e-5 * size)


def test_an_update_over_an_update_merges_to_one_array():
  inner, dense = low_rank(0, (4, 3), 1)
  outer = LowRank(inner, jnp.ones((4, 1)), jnp.full((1, 3), 2.0), 3.0)
  close(outer.merged(), dense + 6)
  x = jnp.asarray(normal(1, (5, 4)), jnp.float32)
  close(outer.dot(x, "td,de->te"), np.asarray(x) @ (dense + 6))


def test_draws_depend_on_the_name_of_a_layer_and_not_on_the_split_of_the_stack():
  block = BlockConfig(ATTENTION, MLPConfig(mlp_dim=6))
  drawn = []
  for groups in ((LayerGroup((block,), 4),), (LayerGroup((block, block), 2),)):
    model = Decoder(TransformerConfig(dim=8, stack=groups), VOCAB)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.shapes)
    globs = ["layers/*/attention/o", "head/weight"]
    swapped = add_low_rank(model, params, globs, RANK, SCALE, Keys.from_seed(3))
    drawn.append(param_names.unstack(param_names.flatten(swapped), model.layer_groups))
  assert drawn[0].keys() == drawn[1].keys()
  assert drawn[0]["layers/3/attention/o/a"].shape == (4, 4, RANK)
  for name, leaf in drawn[0].items():
    np.testing.assert_array_equal(leaf, drawn[1][name], err_msg=name)
  layers = [drawn[0][f"layers/{layer}/attention/o/a"] for layer in range(4)]
  assert len({np.asarray(layer).tobytes() for layer in layers}) == 4


@pytest.mark.parametrize(
  "globs, rank, message",
  [
    (["layers/*/attention/z"], 1, "names no parameter"),
    (["layers/0/attention/q"], 1, "shares a leaf with 'layers/1/attention/q'"),
    (["final_norm/scale"], 1, "is no matrix"),
    (["layers/*/ffn_norm/scale"], 1, "is no matrix"),
    (["embed/table"], 0, "rank must be at least 1"),
  ],
)
def test_a_choice_that_cannot_be_swapped_is_refused(model, globs, rank, message):
  decoder, params, _ = model
  with pytest.raises(InputError, match=message):
    add_low_rank(decoder, params, globs, rank, SCALE, Keys.from_seed(1))


def test_a_product_over_part_of_a_side_is_refused():
  weight, _ = low_rank(0, (5, 6, 4), 2)
  with pytest.raises(ValueError, match="must contract all of left or all of right"):
    weight.dot(jnp.ones((2, 3, 6)), "blh,nhd->blnd")


def test_updates_over_bfloat16_weights_train_in_float32():
  base = TransformerConfig(dim=8, stack=decoder().config.stack, param_dtype="bfloat16")
  model = Decoder(base, VOCAB)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.shapes)
  params = add_low_rank(model, zeros, ("*/attention/q",), RANK, SCALE, Keys.from_seed(0))
  q = params["stack"]["0"]["0"]["attention"]["q"]
  assert (q.base.dtype, q.a.dtype, q.b.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
  assert merge_low_rank(params)["stack"]["0"]["0"]["attention"]["q"].dtype == jnp.bfloat16
