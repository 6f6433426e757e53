import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError, NotFiniteError
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.generate import Sampling, generate
from jaxmoe.models.next_token import nucleus
from jaxmoe.models.stack import LayerGroup

CONTEXT, EOD, VOCAB = 40, 18, 19
PROMPTS = [np.array(ids, np.int32) for ids in ([EOD, 3, 1], [EOD], [EOD, *range(17), 2, 9, 4, 4])]
GREEDY = Sampling(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def model(decoder_of, params_of):
  """An untied model with a sharp head, so that the likeliest token is clearly so."""
  decoder = decoder_of()
  params = params_of(decoder, 3)
  params["head"]["weight"] = params["head"]["weight"] * 8
  return decoder, params


@pytest.fixture(scope="module")
def logits_after(model):
  """Returns a function from a text to the logits of what follows, without any cache."""
  decoder, params = model

  @jax.jit
  def run(ids_1L, last):
    slot = jnp.arange(CONTEXT)[None]
    tokens = Tokens(ids_1L, slot, (slot <= last).astype(jnp.int32), slot)
    hidden, _, _ = decoder.hidden(params, tokens)
    return decoder.logits(params, hidden)[0, last]

  def after(ids):
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(run(padded, len(ids) - 1))

  return after


def greedy_oracle(logits_after, prompt, max_tokens, eod=EOD):
  """Returns the tokens of full recomputation and the smallest margin of a choice."""
  ids, margin = list(prompt), math.inf
  while len(ids) < len(prompt) + max_tokens and len(ids) <= CONTEXT:
    logits = logits_after(ids)
    best, second = np.argsort(-logits)[:2]
    margin = min(margin, logits[best] - logits[second])
    if best == eod:
      break
    ids.append(int(best))
  return ids[len(prompt) :], margin


@pytest.fixture(scope="module")
def greedy(model):
  return generate(*model, PROMPTS, GREEDY, (CONTEXT, EOD))


def test_cached_greedy_text_equals_full_recomputation(greedy, logits_after):
  for row, prompt in zip(greedy, PROMPTS, strict=True):
    expected, margin = greedy_oracle(logits_after, prompt, 12)
    assert margin > 1e-3, "a tie in float32: choose another seed"
    assert row == expected
  assert len({token for row in greedy for token in row}) > 3, "a model that repeats proves nothing"


def test_greedy_text_is_that_of_before(greedy):
  """As commit 0395706 wrote it, a token at a time, from leaves stacked over layers."""
  assert greedy[0] == [9] * 8 + [6] + [9] * 3
  assert greedy[1] == [9] * 12
  assert greedy[2] == [6, 5, 8, 9, 6, 14, 9, 16, 14, 13, 7, 9]


def test_a_cache_that_forgets_its_first_slot_is_noticed(model, greedy, monkeypatch):
  """The comparison above would fail if what lies in the cache did not matter."""
  decoder, params = model
  hidden = decoder.hidden

  def forgetful(params, tokens, caches=None, keys=None):
    out, caches, sums = hidden(params, tokens, caches, keys)
    forget = lambda path, leaf: leaf.at[:, :, :, 0].set(0) if "_BKSH" in str(path[-1]) else leaf  # noqa: E731
    return out, jax.tree_util.tree_map_with_path(forget, caches), sums

  other = type(decoder)(decoder.config, decoder.vocab_size)
  monkeypatch.setattr(other, "hidden", forgetful)
  assert generate(other, params, PROMPTS, GREEDY, (CONTEXT, EOD)) != greedy


def test_rows_of_different_lengths_equal_each_alone(model, greedy):
  for row, prompt in zip(greedy, PROMPTS, strict=True):
    assert generate(*model, [prompt], GREEDY, (CONTEXT, EOD)) == [row]


def test_max_tokens_cuts_and_emit_sees_every_token_in_order(model, greedy):
  seen = [[] for _ in PROMPTS]
  rows = generate(
    *model, PROMPTS, Sampling(5, 0.0), (CONTEXT, EOD), lambda row, token: seen[row].append(token)
  )
  assert rows == seen == [row[:5] for row in greedy]


def test_the_end_of_document_ends_a_row_and_is_not_part_of_it(model, greedy):
  last = greedy[0][6]
  end = greedy[0].index(last)
  prompts = [np.where(prompt == last, 0, prompt) for prompt in PROMPTS[:1]]
  np.testing.assert_array_equal(prompts[0], PROMPTS[0])
  rows = generate(*model, PROMPTS, GREEDY, (CONTEXT, last))
  assert rows[0] == greedy[0][:end]
  for row, whole in zip(rows[1:], greedy[1:]):
    assert row == (whole[: whole.index(last)] if last in whole else whole)


def test_the_end_of_the_context_ends_a_row(model, logits_after):
  prompt = np.array([EOD, *[5, 7] * 18], np.int32)
  sampling = Sampling(max_tokens=30, temperature=0.0)
  rows = generate(*model, [prompt, PROMPTS[0]], sampling, (CONTEXT, VOCAB))
  # The context holds 3 more tokens, and predicts one after the last.
  assert rows[0] == greedy_oracle(logits_after, prompt, 30, eod=VOCAB)[0]
  assert [len(row) for row in rows] == [CONTEXT - len(prompt) + 1, 30]


def test_a_seed_and_a_row_give_the_same_text_and_others_another(model):
  def write(seed, prompts=PROMPTS):
    return generate(*model, prompts, Sampling(12, 2.0, 1.0, seed), (CONTEXT, EOD))

  first = write(1)
  assert write(1) == first
  assert write(2) != first
  assert write(1, PROMPTS[:1]) == first[:1]
  same = write(1, [PROMPTS[0]] * 2)
  assert same[0] != same[1]


def test_a_temperature_or_a_nucleus_close_to_nothing_takes_the_likeliest_token(model, greedy):
  for sampling in (Sampling(12, 1e-6, 1.0), Sampling(12, 1e-42, 1.0), Sampling(12, 1.0, 1e-9)):
    assert generate(*model, PROMPTS, sampling, (CONTEXT, EOD)) == greedy


def nucleus_oracle(logits, top_p):
  """Holtzman et al. 2020: the fewest tokens whose probabilities sum to at least top_p."""
  probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
  kept, total = set(), 0.0
  for token in np.argsort(-probability, kind="stable"):
    if total >= top_p:
      break
    kept.add(int(token))
    total += probability[token]
  return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.3, 0.5, 0.75, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_that_holds_top_p(top_p):
  keep = jax.jit(nucleus)
  for seed in range(20):
    logits = np.random.default_rng(seed).normal(0, 2, 11).astype(np.float32)
    kept = np.asarray(keep(logits, jnp.float32(top_p)))
    assert set(np.flatnonzero(np.isfinite(kept)).tolist()) == nucleus_oracle(logits, top_p)
    np.testing.assert_array_equal(kept[np.isfinite(kept)], logits[np.isfinite(kept)])


def test_a_nucleus_of_one_keeps_every_token():
  logits = jnp.array([0.0, -90.0, 40.0, -40.0])
  np.testing.assert_array_equal(nucleus(logits, jnp.float32(1)), logits)


@pytest.fixture(scope="module")
def frequencies(decoder_of, params_of):
  """Returns a function from sampling to (frequencies of the next token, logits) of 4,000 rows."""
  decoder = decoder_of(
    stack=lambda block: (LayerGroup((block,), repeats=1),), vocab_size=6
  )
  params = params_of(decoder, 1)
  rows = 4000
  prompts = [np.array([5, 2], np.int32)] * rows
  tokens = Tokens.of_ids(jnp.array([[5, 2]]))
  hidden, _, _ = decoder.hidden(params, tokens)
  logits = np.asarray(decoder.logits(params, hidden)[0, -1], np.float64)

  def of(temperature, top_p):
    written = []
    sampling = Sampling(1, temperature, top_p)
    generate(decoder, params, prompts, sampling, (8, 6), lambda row, token: written.append(token))
    assert len(written) == rows
    return np.bincount(written, minlength=6) / rows, logits

  return of


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_tokens_are_drawn_with_their_probabilities(frequencies, temperature, top_p):
  found, logits = frequencies(temperature, top_p)
  scaled = logits / temperature
  right = np.exp(scaled - scaled.max())
  right /= right.sum()
  if top_p < 1:
    right = np.where([token in nucleus_oracle(scaled, top_p) for token in range(6)], right, 0)
    right /= right.sum()
  # Five deviations of a share among 4,000 draws; the seed is fixed, so this fails always or never.
  assert (np.abs(found - right) <= 5 * np.sqrt(right * (1 - right) / 4000)).all(), (found, right)


def test_logits_that_are_not_finite_raise_instead_of_writing_token_zero(model):
  decoder, params = model
  broken = {**params, "embed": {"table": params["embed"]["table"].at[3].set(np.nan)}}
  for sampling in (GREEDY, Sampling(3)):
    with pytest.raises(NotFiniteError, match="not finite"):
      generate(decoder, broken, [PROMPTS[1], PROMPTS[0]], sampling, (CONTEXT, EOD))


def test_an_id_outside_the_vocabulary_raises(model):
  with pytest.raises(NotFiniteError):
    generate(*model, [np.array([EOD, VOCAB], np.int32)], GREEDY, (CONTEXT, EOD))


@pytest.mark.parametrize("length", [0, CONTEXT, CONTEXT + 1])
def test_an_empty_prompt_and_one_that_fills_the_context_are_refused(model, length):
  prompts = [PROMPTS[0], np.full(length, 1, np.int32)]
  with pytest.raises(InputError, match=f"prompt 1 has {length} tokens"):
    generate(*model, prompts, GREEDY, (CONTEXT, EOD))


def test_no_prompt_at_all_is_refused(model):
  with pytest.raises(InputError, match="prompt"):
    generate(*model, [], GREEDY, (CONTEXT, EOD))


@pytest.mark.parametrize(
  "values",
  [
    {"max_tokens": 0},
    {"max_tokens": -3},
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"top_p": 0.0},
    {"top_p": 1.01},
    {"top_p": math.nan},
    {"seed": -1},
    {"seed": 2**32},
  ],
  ids=str,
)
def test_values_that_make_no_sampling_are_refused(values):
  with pytest.raises(InputError, match=next(iter(values))):
    Sampling(**values)
