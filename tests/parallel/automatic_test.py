"""Specs of small models written in plain jnp: equal to one device, and one exchange a block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.core.layout import dims_by_path
from jaxmoe.core.param_names import flatten
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.hlo.compiled import collectives
from jaxmoe.parallel import Parallel, automatic_layout, make_layout, make_mesh
from jaxmoe.parity.cells import Cell
from jaxmoe.parity.fixture import batch_of as packed_rows
from jaxmoe.parity.fixture import decoder_of
from tests.parallel.toys import (
  MODELS,
  B,
  D,
  E,
  F,
  H,
  L,
  R,
  V,
  absorbed,
  all_experts,
  attend,
  attention,
  attention_shapes,
  batch_of,
  decoder,
  experts_in_turn,
  ffn,
  fused_gate,
  mlp_shapes,
  paired_gate,
  params_of,
  picked_experts,
  scattered_experts,
  sorted_experts,
  tree,
)

# Half the time to compile; what is exchanged stays the same.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def mesh_of(**degrees):
  return make_mesh(Parallel(**degrees), jax.devices())


def specs_of(loss, shapes, batch=None, **degrees):
  found = automatic_layout(loss, abstract(shapes), batch or batch_of(), mesh_of(**degrees))
  return found, {path: tuple(spec) for path, spec in flatten(found.specs).items()}


def abstract(shapes):
  def leaf(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  return jax.tree.map(leaf, shapes, is_leaf=lambda s: isinstance(s, tuple))


def compiled(function, found, mesh, shapes):
  shardings = jax.tree.map(functools.partial(NamedSharding, mesh), found.specs)
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
  batch = dict.fromkeys(batch_of(), rows)
  lowered = jax.jit(function, in_shardings=(shardings, batch)).lower(abstract(shapes), batch_of())
  return lowered.compile(QUICKLY)


def alone(function, shapes):
  given = (params_of(shapes), batch_of())
  return jax.jit(function).lower(*given).compile(QUICKLY)(*given)


def counted(program, mesh, scope):
  """Returns {kind: times} of the collectives of a scope."""
  count = {}
  for found in collectives(program, mesh):
    if f"/{scope}/" in found.scope:
      count[found.kind] = count.get(found.kind, 0) + found.times
  return count


@pytest.mark.parametrize("name", MODELS)
def test_a_block_exchanges_once_and_no_weight_moves(name):
  loss, shapes = MODELS[name]
  found, _ = specs_of(loss, shapes, tensor=4)
  mesh = mesh_of(tensor=4)
  program = compiled(loss, found, mesh, shapes)
  blocks = 3 if name == "encoder and decoder" else 2
  assert counted(program, mesh, "attn") == {"all-reduce": blocks}
  assert counted(program, mesh, "ffn") == {"all-reduce": blocks}
  assert {each.kind for each in collectives(program, mesh)} == {"all-reduce"}


@pytest.mark.parametrize("name", ["few keys", "latent", "experts", "encoder and decoder"])
def test_loss_and_gradients_are_those_of_one_device(name):
  loss, shapes = MODELS[name]
  degrees = {"data": 2, "expert": 2, "tensor": 2} if name == "experts" else {"data": 2, "tensor": 4}
  found, _ = specs_of(loss, shapes, **degrees)
  mesh = mesh_of(**degrees)
  function = jax.value_and_grad(loss)
  program = compiled(function, found, mesh, shapes)
  shardings = program.input_shardings[0]
  value, grads = program(*jax.device_put((params_of(shapes), batch_of()), shardings))
  value_one, grads_one = alone(function, shapes)
  np.testing.assert_allclose(value, value_one, rtol=1e-6)
  largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads_one))
  for path, leaf in flatten(grads).items():
    np.testing.assert_allclose(
      leaf, flatten(grads_one)[path], rtol=1e-5, atol=1e-6 * largest, err_msg=path
    )


def test_experts_lie_over_expert_and_rule_1_holds_inside():
  loss, shapes = MODELS["experts"]
  found, specs = specs_of(loss, shapes, expert=2, tensor=2)
  assert specs["blocks/mlp/gate"] == (None, "expert", None, "tensor")
  assert specs["blocks/mlp/down"] == (None, "expert", "tensor", None)
  assert specs["blocks/mlp/inner_bias"] == (None, "expert", "tensor")
  assert specs["blocks/mlp/router"] == (None, None, None)
  assert specs["blocks/mlp/shared/down"] == (None, "tensor", None)
  assert found.dims["blocks"]["mlp"]["gate"] == ("layer", "expert", None, "mlp")
  assert "whole: it scores experts" in found.table()


def test_no_weight_of_an_expert_moves():
  loss, shapes = MODELS["experts"]
  found, _ = specs_of(loss, shapes, expert=2, tensor=4)
  mesh = mesh_of(expert=2, tensor=4)
  moved = {each.shape for each in collectives(compiled(loss, found, mesh, shapes), mesh)}
  sizes = {D * F, F * D}  # of one expert
  assert not [shape for shape in moved if np.prod(shape[-2:]) in sizes]


def test_experts_that_do_not_divide_stay_whole():
  loss, shapes = MODELS["experts"]
  found, specs = specs_of(loss, shapes, expert=8)
  assert specs["blocks/mlp/gate"] == (None, None, None, None)
  assert "4 experts cannot be divided by 8" in found.table()


def test_few_key_heads_stay_whole_and_queries_are_cut():
  found, specs = specs_of(*MODELS["few keys"], tensor=4)
  assert specs["blocks/attention/k"] == specs["blocks/attention/v"] == (None, None, None)
  assert specs["blocks/attention/v_bias"] == (None, None)
  assert specs["blocks/attention/q"] == (None, None, "tensor")
  assert specs["blocks/attention/q_bias"] == (None, "tensor")
  assert specs["blocks/attention/o"] == (None, "tensor", None)
  assert "2 heads cannot be divided by 4" in found.reasons["blocks"]["attention"]["k"]


def renamed(shapes, seed):
  """Returns the tree with the names of each dict dealt anew, and how to get back."""
  rng = np.random.default_rng(seed)

  def away(node):
    if not isinstance(node, dict):
      return node, lambda x: x
    old = list(node)
    new = [f"down_{i}" if i % 2 else f"wq_{i}" for i in rng.permutation(len(old))]
    pairs = {name: away(node[name]) for name in old}
    def back(tree):
      return {name: pairs[name][1](tree[other]) for name, other in zip(old, new)}
    return {other: pairs[name][0] for name, other in zip(old, new)}, back

  return away(shapes)


@pytest.mark.parametrize("name", MODELS)
def test_names_and_their_order_decide_nothing(name):
  loss, shapes = MODELS[name]
  _, expected = specs_of(loss, shapes, expert=2, tensor=4)
  for seed in range(3):
    other, back = renamed(shapes, seed)
    found, _ = specs_of(lambda p, b, back=back: loss(back(p), b), other, expert=2, tensor=4)
    assert {path: tuple(s) for path, s in flatten(back(found.specs)).items()} == expected


def fused(order):
  """Attention with one kernel for queries, keys and values, whose dims stand in this order."""

  def layer(p, x):
    y = x @ p["qkv"]
    if order == "split":
      q, k, v = (z.reshape(*x.shape[:2], 4, H) for z in jnp.split(y, 3, axis=-1))
    else:
      sizes = {"3": 3, "N": 4, "H": H}
      y = y.reshape(*x.shape[:2], *(sizes[dim] for dim in order))
      q, k, v = (jnp.take(y, i, axis=2 + order.index("3")) for i in range(3))
      if order.index("H") < order.index("N"):
        q, k, v = (z.swapaxes(-1, -2) for z in (q, k, v))
    return attend(q, k, v).reshape(*x.shape[:2], -1) @ p["o"]

  return layer


@pytest.mark.parametrize("order", ["split", "3NH", "N3H", "NH3", "H3N"])
def test_a_fused_kernel_is_cut_only_where_that_cuts_heads(order):
  shapes = tree({"qkv": (D, 3 * 4 * H), "o": (4 * H, D)}, mlp_shapes())
  loss = decoder(fused(order), ffn)
  found, specs = specs_of(loss, shapes, tensor=4)
  fits = order.startswith("N")
  assert specs["blocks/attention/qkv"] == (None, None, "tensor" if fits else None)
  if order in ("H3N", "N3H"):
    return  # nothing new to compile
  mesh = mesh_of(tensor=4)
  program = compiled(loss, found, mesh, shapes)
  assert {each.kind for each in collectives(program, mesh)} == {"all-reduce"}
  value = program(*jax.device_put((params_of(shapes), batch_of()), program.input_shardings[0]))
  np.testing.assert_allclose(value, alone(loss, shapes), rtol=1e-6)


def test_gate_and_up_in_one_kernel_are_cut_only_where_both_are():
  shapes = tree(attention_shapes(), {"both": (D, 2 * F), "down": (F, D)})
  found, specs = specs_of(decoder(attention, fused_gate), shapes, tensor=4)
  assert specs["blocks/mlp/both"] == (None, None, None)
  assert "is cut into parts" in found.reasons["blocks"]["mlp"]["both"]
  shapes = tree(attention_shapes(), {"both": (D, 2, F), "down": (F, D)})
  _, specs = specs_of(decoder(attention, paired_gate), shapes, tensor=4)
  assert specs["blocks/mlp/both"] == (None, None, None, "tensor")
  assert specs["blocks/mlp/down"] == (None, "tensor", None)


@pytest.mark.parametrize("layer", [all_experts, sorted_experts, scattered_experts])
def test_experts_are_known_however_rows_get_to_them(layer):
  of = {"gate": (E, D, F), "down": (E, F, D), "router": (D, E)}
  _, specs = specs_of(decoder(attention, layer), tree(attention_shapes(), of), expert=2, tensor=2)
  assert specs["blocks/mlp/gate"] == (None, "expert", None, "tensor")
  assert specs["blocks/mlp/down"] == (None, "expert", "tensor", None)
  assert specs["blocks/mlp/router"] == (None, None, None)


@pytest.mark.parametrize("layer", [picked_experts, experts_in_turn])
def test_experts_that_are_taken_one_by_one_are_cut_inside_alone(layer):
  of = {"gate": (E, D, F), "down": (E, F, D), "router": (D, E), "bias": (E,)}
  _, specs = specs_of(decoder(attention, layer), tree(attention_shapes(), of), expert=2, tensor=2)
  assert specs["blocks/mlp/bias"] == (None, None)
  assert specs["blocks/mlp/gate"] == (None, None, None, "tensor")
  assert specs["blocks/mlp/down"] == (None, None, "tensor", None)
  assert specs["blocks/mlp/router"] == (None, None, None)


@pytest.mark.parametrize("dispatch", ["dropless", "capacity", "einsum", "dense"])
def test_what_is_found_in_a_decoder_is_what_its_dims_say(dispatch):
  parallel = Parallel(expert=2, tensor=2)
  model = decoder_of(Cell(parallel, dispatch=dispatch))
  layout = make_layout(parallel, jax.devices())

  def loss(params, batch):
    return model.hidden(params, Tokens.of_batch(batch), keys=Keys.from_seed(0))[0].sum()

  found = flatten(automatic_layout(loss, model.shapes, packed_rows(), layout.mesh).specs)
  for path, dims in dims_by_path(model.dims, model.shapes).items():
    said = tuple(layout.spec("params", dims, flatten(model.shapes)[path].shape))
    # Experts multiply with gate and up as one kernel, side by side: tensor parts would cut it.
    inside = "/experts/" in path
    assert tuple(found[path])[: 2 if inside else None] == said[: 2 if inside else None], path


def test_a_matrix_for_each_head_is_no_expert():
  of = {"down": (D, R), "q": (D, 4, H), "up_k": (4, R, H), "up_v": (4, R, H), "o": (4, H, D)}
  shapes = tree(of, mlp_shapes())
  loss = decoder(absorbed, ffn)
  found, specs = specs_of(loss, shapes, expert=2, tensor=4)
  assert specs["blocks/attention/down"] == (None, None, None)
  assert specs["blocks/attention/q"] == (None, None, "tensor", None)
  for name in ("up_k", "up_v", "o"):
    assert specs[f"blocks/attention/{name}"] == (None, "tensor", None, None)
  mesh = mesh_of(tensor=4)
  assert counted(compiled(loss, found, mesh, shapes), mesh, "attn") == {"all-reduce": 2}


def chain(p, batch):
  x = batch["x"]
  for weight in p[:-1]:
    x = jax.nn.relu(x @ weight)
  return ((x @ p[-1] - batch["y"]) ** 2).mean()


def test_products_in_a_row_are_cut_in_pairs():
  shapes = [(6, 16), (16, 16), (16, 16), (16, 8), (8, 4)]
  batch = {"x": jnp.ones((B, 6)), "y": jnp.ones((B, 4))}
  _, specs = specs_of(chain, shapes, batch, tensor=4)
  out, taken = (None, "tensor"), ("tensor", None)
  assert list(specs.values()) == [out, taken, out, taken, (None, None)]


def test_a_stream_stays_whole_also_where_it_comes_first():
  def loss(p, batch):
    x = batch["x"] @ p["first"]
    return (ffn(p["mlp"], x) + x).mean()

  shapes = {"first": (6, D), "mlp": mlp_shapes()}
  _, specs = specs_of(loss, shapes, {"x": jnp.ones((B, L, 6))}, tensor=4)
  assert specs["first"] == (None, None)
  assert specs["mlp/down"] == ("tensor", None)


def test_few_values_are_not_cut_inside_a_head():
  def layer(p, x):
    q, k, v = ((x @ p[name]).reshape(*x.shape[:2], -1, 6) for name in "qkv")
    return attend(q, k, v).reshape(*x.shape[:2], -1) @ p["o"]

  shapes = tree({"q": (D, 48), "k": (D, 12), "v": (D, 12), "o": (48, D)}, mlp_shapes())
  _, specs = specs_of(decoder(layer, ffn), shapes, tensor=4)
  assert specs["blocks/attention/o"] == (None, "tensor", None)
  assert specs["blocks/attention/k"] == specs["blocks/attention/v"] == (None, None, None)


def recurrent(p, batch):
  def step(h, x):
    return jnp.tanh(x @ p["inner"] + h @ p["again"]), None

  h, _ = jax.lax.scan(step, jnp.zeros((B, 16)), batch["x"].swapaxes(0, 1))
  return ((h @ p["out"] - batch["y"]) ** 2).mean()


def test_what_makes_what_it_takes_stays_whole():
  shapes = {"inner": (6, 16), "again": (16, 16), "out": (16, 4)}
  batch = {"x": jnp.ones((B, L, 6)), "y": jnp.ones((B, 4))}
  found, specs = specs_of(recurrent, shapes, batch, tensor=4)
  assert set(specs.values()) == {(None, None)}
  assert found.reasons["again"] == "whole: what it makes and takes is one dim"


def test_what_is_not_understood_is_left_whole():
  def loss(p, batch):
    return (jnp.fft.rfft(batch["x"] @ p["a"]).real @ p["b"]).sum()

  shapes = {"a": (6, 16), "b": (9, 4)}
  found, specs = specs_of(loss, shapes, {"x": jnp.ones((B, 6))}, tensor=4)
  assert specs["a"] == (None, None)
  assert "not understood" in found.reasons["a"]


@pytest.mark.parametrize("vocab, expected", [(V, "tensor"), (V + 1, None)])
def test_a_table_is_cut_along_its_rows_if_they_divide(vocab, expected):
  def loss(p, batch):
    return (p["embed"][batch["ids"]] @ p["embed"].T).sum() + p["fixed"][jnp.arange(L)].sum()

  shapes = {"embed": (vocab, D), "fixed": (V, D)}
  _, specs = specs_of(loss, shapes, tensor=4)
  assert specs == {"embed": (expected, None), "fixed": (None, None)}
