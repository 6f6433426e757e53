"""The oracle of a token: brute force finds the same, budgets hold, a planted layer is found."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.dispatch import Capacity
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.routing_oracle import (
  METHODS,
  SKIP,
  Beam,
  Coordinate,
  Exhaustive,
  LastToken,
  Patterns,
  Sampled,
  Tried,
  oracle_search,
  study,
)  # fmt: skip

VOCAB, BIG, SMALL = 11, 0, 1
ATTENTION = SoftmaxAttention(num_heads=1, num_kv_heads=1, head_dim=4)
# Of a capacity that would drop: the oracle must see what an expert does, not whether it was full.
SPARSE = BlockConfig(
  ATTENTION, MoEConfig(2, 1, experts=SwiGLU(mlp_dim=6), dispatch=Capacity(factor=0.5))
)
MODEL = TransformerConfig(
  dim=8,
  stack=(
    LayerGroup((SPARSE, BlockConfig(ATTENTION, MLPConfig(mlp_dim=4))), 2),
    LayerGroup((SPARSE,), 2),
  ),
)
IDS = np.random.default_rng(0).integers(0, VOCAB, 5)
LABELS = (3, 7)
COSTS = np.array([[3.0, 1.0, 0.0]] * 4)  # as if expert 1 were a third of expert 0


@pytest.fixture(scope="module")
def last():
  decoder = Decoder(MODEL, VOCAB)
  params = decoder.init(Keys.from_seed(1))
  noise = np.random.default_rng(2)
  params = jax.tree.map(
    lambda x: x + jnp.asarray(0.3 * noise.normal(size=x.shape), x.dtype), params
  )
  patterns = dataclasses.replace(Patterns.of(MODEL), flops_LK=COSTS)
  return LastToken.of(decoder, params, patterns, slots=6, chunk=81, policy=SMALL)


@pytest.fixture(scope="module")
def tried(last):
  return Tried(last.at(IDS, LABELS).losses)


def brute_force(last, label):
  """Returns {pattern of expert ids: loss} by one whole pass, without a cache, for each."""

  @jax.jit
  def loss(given):
    tokens = dataclasses.replace(Tokens.of_ids(jnp.asarray(IDS[None])), replayed_experts=given)
    hidden, _, _ = last.decoder.hidden(last.params, tokens)
    return last.decoder.logits(last.params, hidden)[0, -1]

  losses = {}
  for kinds in itertools.product((BIG, SMALL, SKIP), repeat=4):
    given = np.full((6, 1, 5, 1), SMALL, np.int32)
    for depth, kind in zip((0, 2, 4, 5), kinds):
      given[depth, 0, -1, 0] = kind
    logits = np.asarray(loss(given), np.float64)
    losses[kinds] = np.log(np.exp(logits).sum()) - logits[label]
  return losses


def test_exhaustive_search_is_brute_force_over_all_81_patterns(last, tried):
  found = oracle_search(tried, last.patterns, [0, 1, 3, 5, 12], Exhaustive())
  assert found.num_tried == 81
  for label, right in ((0, brute_force(last, LABELS[0])), (1, brute_force(last, LABELS[1]))):
    got = tried(last.patterns.all(), label)
    ids = [tuple(row) for row in np.array([BIG, SMALL, SKIP])[last.patterns.all()].tolist()]
    np.testing.assert_allclose(got, [right[kinds] for kinds in ids], rtol=1e-5, atol=1e-5)
  cost = {BIG: 3, SMALL: 1, SKIP: 0}
  right = brute_force(last, LABELS[0])
  for budget, pattern, loss in zip((0, 1, 3, 5, 12), found.patterns, found.losses):
    within = {k: of for k, of in right.items() if sum(cost[kind] for kind in k) <= budget}
    best = min(within, key=within.get)
    assert tuple(np.array([BIG, SMALL, SKIP])[pattern]) == best
    np.testing.assert_allclose(loss, within[best], rtol=1e-5)


def test_of_equal_losses_the_cheapest_is_found_and_each_label_has_losses_of_its_own():
  patterns = Patterns((0, 1), 2, (BIG, SMALL, SKIP), COSTS[:2])
  tried = Tried(lambda some: np.stack([np.ones(len(some)), -patterns.flops(some)], axis=1))
  for label, flops in ((0, [0, 0, 0]), (1, [0, 4, 6])):
    found = oracle_search(tried, patterns, [0, 5, 6], Exhaustive(), label)
    np.testing.assert_array_equal(found.flops, flops)
    np.testing.assert_array_equal(found.losses, 1 if label == 0 else -found.flops)


@pytest.mark.parametrize("method", [Beam(2), Coordinate()], ids=str)
def test_a_method_that_goes_step_by_step_tries_nothing_above_its_budget(method):
  patterns = Patterns((0, 1), 2, (BIG, SMALL, SKIP), COSTS[:2])
  tried = Tried(lambda some: -patterns.flops(some)[:, None])
  assert oracle_search(tried, patterns, [4], method).flops == patterns.flops(tried.all()[0]).max()


def test_a_pattern_is_given_by_the_ids_of_its_kinds_in_the_layers_that_have_experts():
  given = Patterns.of(MODEL, (SKIP, SMALL, BIG)).replayed_experts(
    np.array([[0, 1, 2, 1], [2, 0, 1, 2]])
  )
  assert given.shape == (6, 2, 1, 1)
  right = [[-1, 0], [-1, -1], [1, -1], [-1, -1], [0, 1], [1, 0]]  # depths 1 and 3 are dense
  np.testing.assert_array_equal(given[:, :, 0, 0], right)


@pytest.mark.parametrize("method", [Sampled(40), Beam(2), Coordinate()], ids=lambda m: str(m))
def test_every_method_keeps_its_budgets_and_never_loses_by_a_larger_one(method, last, tried):
  budgets = [0, 1, 2, 4, 7, 12]
  losses = Tried(lambda some: np.stack([tried(some)], axis=1))
  found = oracle_search(losses, last.patterns, budgets, method)
  right = oracle_search(tried, last.patterns, budgets, Exhaustive())
  assert (found.flops <= budgets).all() and (np.diff(found.losses) <= 0).all()
  np.testing.assert_array_equal(found.flops, last.patterns.flops(found.patterns))
  assert (found.losses >= right.losses).all() and found.num_tried < 81
  assert found.losses[-1] < losses(last.patterns.cheapest()[None])[0]


def test_a_wide_beam_is_exhaustive(last, tried):
  losses = Tried(lambda some: np.stack([tried(some)], axis=1))
  found = oracle_search(losses, last.patterns, [12], Beam(81))
  assert found.num_tried == 81


def planted(layer):
  """Returns a model of which only expert BIG of one layer moves the stream, to favour label 3."""
  decoder = Decoder(MODEL, VOCAB)
  params = decoder.init(Keys.from_seed(1))
  blocks = params["stack"]
  for s, j in (("0", "0"), ("1", "0")):
    down = blocks[s][j]["moe"]["experts"]["down"]
    blocks[s][j]["moe"]["experts"]["down"] = jnp.zeros_like(down)
  s, repeat = (("0", 0), ("0", 1), ("1", 0), ("1", 1))[layer]
  experts = blocks[s]["0"]["moe"]["experts"]
  # The table: the last token's own direction through silu, to the column of label 3.
  head = params["head"]["weight"][:, LABELS[0]]
  experts["gate_up"] = experts["gate_up"].at[repeat, BIG].set(0.0)
  row = params["embed"]["table"][IDS[-1]]
  one = jnp.stack([row, row]).T[:, :, None] * jnp.ones((1, 1, 6))
  experts["gate_up"] = experts["gate_up"].at[repeat, BIG].set(one)
  experts["down"] = experts["down"].at[repeat, BIG].set(jnp.ones((6, 1)) * head[None])
  return decoder, params


@pytest.mark.parametrize("layer", range(4))
def test_the_oracle_of_one_big_layer_picks_the_one_that_holds_the_table(layer):
  decoder, params = planted(layer)
  patterns = dataclasses.replace(Patterns.of(MODEL), flops_LK=COSTS)
  last = LastToken.of(decoder, params, patterns, slots=6, chunk=81, policy=SMALL)
  tried = Tried(last.at(IDS, LABELS).losses)
  found = oracle_search(tried, patterns, [2, 3], Exhaustive())
  assert found.losses[0] > found.losses[1] + 0.5  # without a big one nothing helps
  big = np.flatnonzero(found.patterns[1] == patterns.kinds.index(BIG))
  assert big.tolist() == [layer]


def test_the_router_s_own_choices_are_a_pattern_and_its_loss_is_that_pattern_s(last):
  text = dataclasses.replace(last, policy=None).at(IDS, LABELS)
  expert_L, losses = text.router()
  assert set(expert_L.tolist()) <= {BIG, SMALL}
  same = text.losses(np.array([[last.patterns.kinds.index(kind) for kind in expert_L]]))
  np.testing.assert_allclose(losses, same[0], rtol=1e-5)
  tokens = Tokens.of_ids(jnp.asarray(IDS[None]))
  hidden, _, _ = last.decoder.hidden(last.params, tokens)
  logits = np.asarray(last.decoder.logits(last.params, hidden)[0, -1], np.float64)
  right = np.log(np.exp(logits).sum()) - logits[list(LABELS)]
  np.testing.assert_allclose(losses, right, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def told(last):
  rng = np.random.default_rng(5)
  texts = [(rng.integers(0, VOCAB, size), int(rng.integers(VOCAB))) for size in (5, 3, 4, 5)]
  last = dataclasses.replace(last, policy=None)
  return study(last, texts, [0, 3, 6, 12], Exhaustive(), num_random=20)


def test_a_study_orders_oracle_best_random_and_random_and_the_oracle_beats_the_router(told):
  curves = told["curves"]
  assert np.all(np.diff(curves["oracle"]) <= 0)
  for oracle, best, mean in zip(curves["oracle"], curves["best_of_random"], curves["random"]):
    if best is not None:
      assert oracle <= best <= mean
  assert None not in (curves["random"][-1], curves["best_of_random"][-1])
  assert told["router"]["oracle_at_its_flops"] <= told["router"]["loss"]
  assert curves["oracle"][-1] <= min(told["uniform"].values())


def test_a_study_counts_agreement_and_difficulty_and_what_luck_gains(told):
  matrix = np.array(told["agreement"]["router_by_oracle"])
  assert matrix.sum() == 4 * 4
  assert np.trace(matrix) == pytest.approx(4 * sum(told["agreement"]["by_layer"]))
  assert matrix[2].sum() == 0  # the router cannot skip
  assert told["difficulty"]["base"] == SMALL
  gains, losses = np.array(told["difficulty"]["gains"]), np.array(told["difficulty"]["losses"])
  assert np.mean(losses - gains) == pytest.approx(told["curves"]["oracle"][-1])
  assert told["selection"]["gain"] == pytest.approx(gains.mean())
  assert (gains >= 0).all() and told["selection"]["gain_of_shuffled_labels"] > 0
  # Sums in another order: a cache of six slots against five keys.
  assert told["selection"]["largest_change_without_cache"] < 1e-4
  assert "no model that can be run" in told["warning"] and "single token" in told["warning"]


def test_a_study_shuffles_labels_among_texts_and_gives_the_oracle_what_the_router_spends():
  patterns = Patterns((0, 1), 2, (BIG, SMALL, SKIP), COSTS[:2])
  loss = lambda labels, some: np.array(labels)[None] - 0.1 * patterns.flops(some)[:, None]  # noqa: E731
  asked = []

  def at(ids, labels):
    asked.append(labels)
    router = np.array([SMALL, SMALL]), loss(labels, np.array([[1, 1]]))[0]
    return types.SimpleNamespace(losses=functools.partial(loss, labels), router=lambda: router)

  again = lambda ids, label, pattern: loss([label], pattern[None])[0, 0]  # noqa: E731
  last = types.SimpleNamespace(patterns=patterns, policy=None, at=at, again=again)
  told = study(last, [(IDS, label) for label in range(4)], [0, 6], Exhaustive())
  assert [own for own, _ in asked] == sorted(other for _, other in asked) == [0, 1, 2, 3]
  assert all(own != other for own, other in asked)
  assert told["router"]["oracle_at_its_flops"] == pytest.approx(told["router"]["loss"])
  assert told["router"]["flops"] == 2 and told["router"]["loss"] == pytest.approx(1.3)


def test_random_patterns_cover_the_costs_between_all_cheap_and_all_big(last):
  flops = last.patterns.flops(last.patterns.random(200, 0))
  assert flops.min() == 0 and flops.max() == 12 and len(np.unique(flops)) == 12


@pytest.mark.parametrize(
  "attempt, why",
  [
    (
      lambda: Patterns.of(TransformerConfig(stack=(LayerGroup((BlockConfig(ffn=MLPConfig(4)),)),))),
      "no MoE layer",
    ),
    (
      lambda: Patterns.of(TransformerConfig(stack=(LayerGroup((BlockConfig(ffn=MoEConfig()),)),))),
      "to several",
    ),
    (lambda: Patterns.of(MODEL, (0, 2)), "below 2"),
    (lambda: Patterns.of(MODEL, (0, 0)), "distinct"),
    (lambda: Sampled(0), "at least one"),
    (lambda: Beam(0), "at least one"),
    (lambda: Coordinate(0), "at least one"),
    (lambda: Exhaustive(80).run(None, Patterns.of(MODEL), 0), "3 kinds in 4 layers make 81"),
    (lambda: oracle_search(None, Patterns.of(MODEL, (0, 1)), [0], Exhaustive()), "at least"),
    (lambda: study(None, [(IDS, 1)], [1], Exhaustive()), "at least two"),
  ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(attempt, why):
  with pytest.raises(InputError, match=why) as refused:
    attempt()
  assert "\n" not in str(refused.value)


def test_every_method_can_be_named():
  assert set(METHODS) == {"exhaustive", "sampled", "beam", "coordinate"}


@pytest.mark.slow
def test_all_4096_patterns_of_twelve_layers_bound_a_beam_and_random_draws():
  model = TransformerConfig(dim=8, stack=(LayerGroup((SPARSE,), 12),))
  decoder = Decoder(model, VOCAB)
  params = decoder.init(Keys.from_seed(1))
  costs = np.tile([[3.0, 1.0]], (12, 1))
  patterns = dataclasses.replace(Patterns.of(model, (BIG, SMALL)), flops_LK=costs)
  last = LastToken.of(decoder, params, patterns, slots=6, chunk=512)
  rng = np.random.default_rng(5)
  texts = [(rng.integers(0, VOCAB, 5), int(rng.integers(VOCAB))) for _ in range(6)]
  budgets = [12 + 2 * big for big in (0, 1, 3, 6, 12)]
  told = study(last, texts, budgets, Exhaustive())
  assert Tried(last.at(*texts[0][:1], LABELS).losses)(patterns.all()).shape == (4096,)
  beam = study(last, texts, budgets, Beam(4))
  for name in ("oracle", "shuffled"):
    assert np.all(np.array(told["curves"][name]) <= np.array(beam["curves"][name]) + 1e-9)
  oracle, best = told["curves"]["oracle"], told["curves"]["best_of_random"]
  assert oracle[3] < best[3] < told["curves"]["random"][3]
  # Half of the layers big, well chosen, beat all of them big.
  assert oracle[3] < told["uniform"]["0"]
