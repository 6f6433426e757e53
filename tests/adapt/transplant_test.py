"""Surgery on parameters: outputs that must stay, and every layer's experts where they belong."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.adapt.surgery import NEW, clone, insert, open_inactive, prune, upcycle
from jaxmoe.adapt.transplant import transplant_moments, transplant_params
from jaxmoe.adapt.variety import Variety
from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys
from jaxmoe.models.block import MLPConfig
from jaxmoe.models.transformer import Decoder
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.gates import ResidualGateConfig
from jaxmoe.optim import OPTIMIZERS, Adafactor, Constant, Optim, make_optimizer

VOCAB = 11
KEYS = Keys.from_seed(7)
IDS = np.random.default_rng(1).integers(0, VOCAB, (2, 9))
ONE = IDS[:1, :1]
USAGE = np.array([[1, 9, 0, 3, 3], [0, 5, 0, 0, 4], [2, 0, 7, 0, 1]])
KEPT = {1: [1, 3, 4], 3: [0, 1, 4], 4: [0, 2, 4]}
OPERATIONS = {
  "insert": lambda model: insert(model, 2),
  "insert copies": lambda model: insert(model, 2, like=(4, 0)),
  "prune": lambda model: prune(model, USAGE, 3),
  "clone": lambda model: clone(model, 2),
}


def operate(surgery, old, params):
  new = Decoder(surgery.model, VOCAB)
  return new, transplant_params(surgery, old, new, params, KEYS)


def draw(decoder):
  return decoder.init(Keys.from_seed(3))


# Outputs.


def test_inserting_leaves_logits_equal_bit_for_bit(patient, logits_of):
  decoder, params = patient
  right, _ = logits_of(decoder, params, IDS)
  got, counts = logits_of(*operate(insert(decoder.config, 3), decoder, params), IDS)
  np.testing.assert_array_equal(got, right)
  assert {depth: len(of) for depth, of in counts.items()} == {1: 5, 3: 5, 4: 5}


def test_opened_experts_are_chosen_and_the_old_ones_keep_what_they_had(patient, logits_of, by_name):
  decoder, params = patient
  closed, wide = operate(insert(decoder.config, 3), decoder, params)
  opened, grown = operate(open_inactive(closed.config), closed, wide)
  _, counts = logits_of(opened, grown, IDS)
  assert all(of[5:].sum() > 0 for of in counts.values())
  before, after = by_name(params, decoder), by_name(grown, opened)
  for depth in KEPT:
    gate = f"layers/{depth}/moe/router/gate/weight"
    np.testing.assert_array_equal(after[gate][:, :5], before[gate])
    assert np.abs(after[gate][:, 5:]).min() > 0
    down = f"layers/{depth}/moe/experts/down"
    np.testing.assert_array_equal(after[down][:5], before[down])
    assert len(np.unique(after[down][5:])) == after[down][5:].size  # no two new ones alike


def test_opening_copies_of_experts_with_copies_of_their_columns_ties_with_them(patient, by_name):
  decoder, params = patient
  closed, wide = operate(insert(decoder.config, 2, like=(4, 1)), decoder, params)
  opened, grown = operate(open_inactive(closed.config, like=(4, 1)), closed, wide)
  after = by_name(grown, opened)
  for depth in KEPT:
    for leaf, axis in (("router/gate/weight", 1), ("experts/down", 0), ("experts/gate_up", 0)):
      x = after[f"layers/{depth}/moe/{leaf}"]
      np.testing.assert_array_equal(x.take([5, 6], axis), x.take([4, 1], axis))


def test_pruning_experts_that_were_never_used_leaves_logits_as_they_were(patient, logits_of):
  decoder, params = patient
  right, counts = logits_of(decoder, params, ONE)
  assert all((of > 0).sum() == 2 for of in counts.values())  # one token, two experts
  usage = list(counts.values())
  got, pruned = logits_of(*operate(prune(decoder.config, usage, 2), decoder, params), ONE)
  # The softmax has fewer terms: the weights are rounded otherwise.
  np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)
  wrong, _ = logits_of(
    *operate(prune(decoder.config, [-of + of.max() for of in usage], 2), decoder, params), ONE
  )
  assert np.abs(wrong - right).max() > 0.01
  assert [of.sum() for of in pruned.values()] == [2, 2, 2]


def test_cloning_leaves_logits_as_they_were(model, top_k, logits_of):
  for name, router in top_k.items():
    decoder = Decoder(model(router=router), VOCAB)
    params = draw(decoder)
    right, before = logits_of(decoder, params, IDS)
    got, after = logits_of(*operate(clone(decoder.config, 2), decoder, params), IDS)
    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5, err_msg=name)
    for depth in before:
      np.testing.assert_array_equal(after[depth], np.repeat(before[depth], 2), err_msg=name)


def test_upcycling_leaves_logits_as_they_were(model, logits_of, by_name):
  dense = Decoder(model(ffn=MLPConfig(mlp_dim=12)), VOCAB)
  params = draw(dense)
  right, _ = logits_of(dense, params, IDS)
  sparse, grown = operate(upcycle(dense.config, MoEConfig(4, 2)), dense, params)
  got, counts = logits_of(sparse, grown, IDS)
  np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)
  assert list(counts) == [0, 1, 2, 3, 4] and all((of > 0).sum() > 2 for of in counts.values())
  before, after = by_name(params, dense), by_name(grown, sparse)
  for depth in range(5):
    for leaf in ("gate_up", "down"):
      for copy in after[f"layers/{depth}/moe/experts/{leaf}"]:
        np.testing.assert_array_equal(copy, before[f"layers/{depth}/mlp/{leaf}"])
  assert sparse.config.moe_records()[0].experts == SwiGLU(mlp_dim=12)


def test_upcycled_experts_differ_where_that_is_asked_for(model, logits_of, by_name):
  dense = Decoder(model(ffn=MLPConfig(mlp_dim=12)), VOCAB)
  params = draw(dense)
  right, _ = logits_of(dense, params, IDS)
  surgery = upcycle(dense.config, MoEConfig(4, 2), Variety(noise=1e-3))
  sparse, grown = operate(surgery, dense, params)
  got, _ = logits_of(sparse, grown, IDS)
  assert 1e-5 < np.abs(got - right).max() < 0.1
  experts = [x for name, x in by_name(grown, sparse).items() if name.endswith("experts/down")]
  assert len(experts) == 5
  flat = np.stack([x[expert].ravel() for x in experts for expert in range(4)])
  assert len(np.unique(flat, axis=0)) == 20


def test_upcycling_leaves_layers_that_are_sparse_already_alone(patient, logits_of):
  decoder, params = patient
  right, _ = logits_of(decoder, params, IDS)
  surgery = upcycle(decoder.config, MoEConfig(3, 1))
  assert list(surgery.experts) == [0, 2]
  got, counts = logits_of(*operate(surgery, decoder, params), IDS)
  np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)
  assert {depth: len(of) for depth, of in counts.items()} == {0: 3, 1: 5, 2: 3, 3: 5, 4: 5}


# Every layer by itself.


def test_each_layer_keeps_its_own_most_used_experts_in_order(patient, by_name):
  decoder, params = patient
  surgery = prune(decoder.config, USAGE, 3)
  assert {depth: list(ids) for depth, ids in surgery.experts.items()} == KEPT
  new, pruned = operate(surgery, decoder, params)
  before, after = by_name(params, decoder), by_name(pruned, new)
  assert before.keys() == after.keys()
  for name, x in before.items():
    kept = KEPT.get(int(name.split("/")[1])) if name.startswith("layers/") else None
    if kept and "/moe/" in name:
      x = x.take(kept, axis=1 if name.endswith("gate/weight") else 0)
    np.testing.assert_array_equal(after[name], x, err_msg=name)


def test_pruning_drops_closed_experts_first(patient, by_name):
  decoder, params = patient
  closed, wide = operate(insert(decoder.config, 2), decoder, params)
  new, pruned = operate(prune(closed.config, USAGE, 5), closed, wide)
  before, after = by_name(params, decoder), by_name(pruned, new)
  assert new.config == decoder.config
  jax.tree.map(np.testing.assert_array_equal, after, before)


# Moments.


def transform_of(optimizer, decoder):
  # Without clipping, whose norm is of all leaves.
  optim = Optim(optimizer, Constant(), learning_rate=0.1, clip_norm=None)
  return make_optimizer(optim, 20, decoder.parameter_names, decoder.dims)


def optimizer_of(name):
  if name == "adafactor":  # factors experts (12 by 12) and not router columns (12 by 10 at most)
    return Adafactor(min_dim_size_to_factor=11)
  return OPTIMIZERS[name][1]


@pytest.fixture(scope="module")
def trained(patient):
  """Returns a function from an optimizer to its state after two steps, a third gradient, its step.
  """
  decoder, params = patient
  noise = np.random.default_rng(5)
  grads = [
    jax.tree.map(lambda x: jnp.asarray(noise.normal(size=x.shape), x.dtype), params)
    for _ in range(3)
  ]

  @functools.cache
  def run(optimizer):
    transform = transform_of(optimizer, decoder)
    state = transform.init(params)
    update = jax.jit(transform.update)
    for grad in grads[:2]:
      _, state = update(grad, state, params)
    return state, grads[2], update(grads[2], state, params)[0]

  return run


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
  "name",
  [name if name == "adamw" else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS],
)
def test_a_step_after_surgery_is_the_step_before_it_for_every_expert(
  name, operation, patient, trained, by_name
):
  decoder, params = patient
  state, grad, right = trained(optimizer_of(name))
  surgery = OPERATIONS[operation](decoder.config)
  new, moved = operate(surgery, decoder, params)
  moved_grad = transplant_params(surgery, decoder, new, grad, KEYS)
  transform = transform_of(optimizer_of(name), new)
  like = jax.eval_shape(transform.init, new.shapes)
  moved_state = transplant_moments(surgery, decoder, new, state, like)
  got, _ = jax.jit(transform.update)(moved_grad, moved_state, moved)
  before, updates = by_name(right, decoder), by_name(got, new)
  for depth, origins in surgery.experts.items():
    old = [at for at, origin in enumerate(origins) if origin != NEW]
    for leaf in ("gate_up", "down"):
      leaf_name = f"layers/{depth}/moe/experts/{leaf}"
      wanted = before[leaf_name][[origins[at] for at in old]]
      np.testing.assert_allclose(updates[leaf_name][old], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_copied_exactly_and_those_of_new_experts_are_zero(
  name, patient, trained, by_name
):
  decoder, _ = patient
  state, _, _ = trained(optimizer_of(name))
  surgery = insert(decoder.config, 2)
  new = Decoder(surgery.model, VOCAB)
  like = jax.eval_shape(transform_of(optimizer_of(name), new).init, new.shapes)
  moved = transplant_moments(surgery, decoder, new, state, like)
  chex_like = jax.tree.map(lambda x: (x.shape, x.dtype), moved)
  assert chex_like == jax.tree.map(lambda x: (x.shape, x.dtype), like)
  before, after = by_name(state, decoder), by_name(moved, new)
  grown = [path for path in before if before[path].shape != after[path].shape]
  assert grown and all("/moe/experts/" in path for path in grown)
  for path, x in before.items():
    if path in grown:
      np.testing.assert_array_equal(after[path][:5], x, err_msg=path)
      np.testing.assert_array_equal(after[path][5:], 0, err_msg=path)
    else:
      np.testing.assert_array_equal(after[path], x, err_msg=path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_an_upcycled_network_are_those_of_the_dense_one(name, model, by_name):
  dense = Decoder(model(ffn=MLPConfig(mlp_dim=12)), VOCAB)
  params = draw(dense)
  transform = transform_of(optimizer_of(name), dense)
  _, state = jax.jit(transform.update)(params, transform.init(params), params)
  surgery = upcycle(dense.config, MoEConfig(4, 2))
  sparse = Decoder(surgery.model, VOCAB)
  like = jax.eval_shape(transform_of(optimizer_of(name), sparse).init, sparse.shapes)
  before = by_name(state, dense)
  after = by_name(transplant_moments(surgery, dense, sparse, state, like), sparse)
  copied = [path for path in after if "/moe/experts/" in path]
  assert copied and any(np.abs(after[path]).max() > 0 for path in copied)
  for path in copied:
    for copy in after[path]:
      np.testing.assert_array_equal(copy, before[path.replace("moe/experts", "mlp")])
  assert all(not after[path].any() for path in after if "/moe/router/" in path)


def test_a_moment_that_averages_over_experts_is_refused(patient, trained):
  decoder, _ = patient
  factored = Adafactor(min_dim_size_to_factor=2)
  state, _, _ = trained(factored)
  for surgery in (prune(decoder.config, USAGE, 3), clone(decoder.config, 2)):
    new = Decoder(surgery.model, VOCAB)
    like = jax.eval_shape(transform_of(factored, new).init, new.shapes)
    with pytest.raises(InputError, match=r"is an average over experts.*reset_moments"):
      transplant_moments(surgery, decoder, new, state, like)


# What is refused.


REFUSED = [
  (lambda model: insert(model, 0), "at least one expert"),
  (lambda model: insert(model, 2, like=(1,)), "for each of the 2 added"),
  (lambda model: insert(model, 1, like=(5,)), "an expert below 5"),
  (open_inactive, "insert first"),
  (lambda model: open_inactive(insert(model, 2).model, like=(1,)), "for each of the 2"),
  (lambda model: prune(model, USAGE, 6), "between 1 and 5"),
  (lambda model: prune(model, USAGE, 1), "num_active must lie"),
  (lambda model: prune(model, USAGE[:2], 3), "a row for each MoE layer"),
  (lambda model: prune(model, -USAGE, 3), "not negative"),
  (lambda model: prune(model, USAGE * np.nan, 3), "finite"),
  (lambda model: clone(model, 1), "at least 2"),
  (lambda model: clone(insert(model, 1).model, 2), "open them first"),
  (lambda model: upcycle(model, MoEConfig(4, 2, shared_mlp_dim=3)), "without a shared one"),
]


@pytest.mark.parametrize("operation, why", REFUSED)
def test_an_operation_that_does_not_fit_is_refused_in_one_line(operation, why, model):
  with pytest.raises(InputError, match=why) as refused:
    operation(model())
  assert "\n" not in str(refused.value)


def test_a_model_without_what_an_operation_needs_is_refused(model):
  dense = model(ffn=MLPConfig(mlp_dim=12))
  for operation in (lambda: insert(dense, 1), lambda: clone(dense, 2)):
    with pytest.raises(InputError, match="no MoE layer; upcycle"):
      operation()
  sparse = dataclasses.replace(model(), stack=model().stack[1:])
  with pytest.raises(InputError, match="no block has a dense"):
    upcycle(sparse, MoEConfig(4, 2))


def test_a_gate_without_a_column_for_each_expert_keeps_its_number_of_them(model):
  decoder = Decoder(model(router=TopK(gate=ResidualGateConfig())), VOCAB)
  params = draw(decoder)
  operate(insert(decoder.config, 2), decoder, params)  # Closed: the gate does not know them.
  with pytest.raises(InputError, match="ResidualGateConfig has no column for each expert"):
    operate(prune(decoder.config, USAGE, 3), decoder, params)
