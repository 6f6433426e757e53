import dataclasses
import gzip
import lzma
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.tokens import Tokens
from jaxmoe.models.masks import CausalMask, DocumentMask
from jaxmoe.models.rope_scaling import DynamicRope, LongRope, PlainRope
from jaxmoe.models.transformer import Decoder
from jaxmoe.moe.dispatch import Capacity, Einsum
from jaxmoe.moe.routers.expert_choice import ExpertChoice
from jaxmoe.moe.routers.forced import Balanced
from jaxmoe.train import evaluate as module
from jaxmoe.train import multiple_choice
from jaxmoe.train.evaluate import (
  compressors,
  document_windows,
  evaluate,
  first_documents,
  scored_alone,
)
from jaxmoe.train.row_packing import packed_batches

L, EOD, VOCAB = 8, 18, 19
LENGTHS = (1, L - 1, L, L + 1, 3 * L // 2, 10 * L)


def document(length, seed, bytes_per_token=3):
  ids = np.random.default_rng(seed).integers(0, EOD, length).astype(np.int32)
  size = bytes_per_token * length
  return types.SimpleNamespace(ids=ids, num_bytes=size, scored=None, scored_bytes=size)


DOCUMENTS = [document(length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def model(decoder_of, params_of):
  decoder = decoder_of()
  return decoder, params_of(decoder)


@pytest.fixture(scope="module")
def bits_alone(model):
  """Returns the bits of every token of a document, each computed alone from its context.

  The rule: windows of L tokens start at 0, L/2, L, ...; a token is predicted from what its first
  window holds before it. The first window starts with the end of document, as every text does.
  """
  decoder, params = model

  @jax.jit
  def log_p(ids_1L, last):
    slot = jnp.arange(L)[None]
    tokens = Tokens(ids_1L, slot, (slot <= last).astype(jnp.int32), slot)
    hidden, _, _ = decoder.hidden(params, tokens)
    return jax.nn.log_softmax(decoder.logits(params, hidden)[0, last])

  def bits(ids):
    text, found = [EOD, *ids.tolist(), EOD], []
    for at in range(1, len(text)):
      start = 0
      while at > start + L:
        start += L // 2
      context = text[start:at]
      padded = np.array([context + [0] * (L - len(context))], np.int32)
      found.append(-float(log_p(padded, len(context) - 1)[text[at]]) / math.log(2))
    return found

  return bits


@pytest.fixture(scope="module")
def expected(bits_alone):
  """Summed bits of each document."""
  return [sum(bits_alone(each.ids)) for each in DOCUMENTS]


@pytest.mark.parametrize("index", range(len(LENGTHS)), ids=[str(length) for length in LENGTHS])
def test_bits_per_byte_is_the_sum_over_tokens_each_computed_alone(model, expected, index):
  scores = evaluate(*model, {"only": [DOCUMENTS[index]]}, (EOD, EOD), (4, L), fitted=False)
  right = expected[index] / DOCUMENTS[index].num_bytes
  np.testing.assert_allclose(scores["bits_per_byte"], right, rtol=1e-5)
  assert scores["domains"] == {"only": scores["bits_per_byte"]}


@pytest.mark.parametrize("order", [range(6), (5, 0, 4, 1, 3, 2), (2, 2, 0, 0, 0, 5, 1)])
def test_packing_windows_into_rows_changes_no_score(model, expected, order):
  documents = [DOCUMENTS[index] for index in order]
  right = sum(expected[index] for index in order) / sum(each.num_bytes for each in documents)
  for rows, fitted in ((1, False), (4, False), (4, True)):
    scores = evaluate(*model, {"all": documents}, (EOD, EOD), (rows, L), fitted=fitted)
    np.testing.assert_allclose(scores["bits_per_byte"], right, rtol=1e-5)


def test_domains_are_scored_apart_and_add_up_by_their_bytes(model, expected):
  domains = {"a": DOCUMENTS[:2], "b": DOCUMENTS[2:5], "c": DOCUMENTS[5:]}
  scores = evaluate(*model, domains, (EOD, EOD), (4, L), fitted=False)
  sizes = {name: sum(each.num_bytes for each in of) for name, of in domains.items()}
  for name, part in (("a", expected[:2]), ("b", expected[2:5]), ("c", expected[5:])):
    np.testing.assert_allclose(scores["domains"][name], sum(part) / sizes[name], rtol=1e-5)
  right = sum(expected) / sum(sizes.values())
  np.testing.assert_allclose(scores["bits_per_byte"], right, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 9, 12, 31, 80])
def test_windows_score_every_token_once_with_at_least_half_a_window_before_it(length, size):
  ids = np.arange(size, dtype=np.int32)
  inputs, labels, scored = [EOD, *ids], [*ids, EOD], []
  for window, (given, wanted) in enumerate(document_windows(ids, (EOD, EOD), length)):
    start = window * max(length // 2, 1)
    assert len(given) == len(wanted) <= length
    np.testing.assert_array_equal(given, inputs[start : start + length])
    fresh = np.flatnonzero(wanted >= 0)
    np.testing.assert_array_equal(wanted[fresh], np.take(labels, start + fresh))
    assert window == 0 or fresh[0] >= length - max(length // 2, 1)
    scored.extend(start + fresh)
  assert scored == list(range(size + 1))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 31])
def test_what_is_not_scored_adds_neither_bits_nor_bytes(model, bits_alone, size):
  only = document(size, 3)
  mask = np.random.default_rng(size).random(size + 1) < 0.4
  mask[size // 2] = True
  masked = types.SimpleNamespace(ids=only.ids, num_bytes=999, scored=mask, scored_bytes=17)
  domains = {"chat": [masked], "text": DOCUMENTS[:2]}
  scores = evaluate(*model, domains, (EOD, EOD), (4, L), fitted=False)
  bits = np.array(bits_alone(only.ids))[mask].sum()
  np.testing.assert_allclose(scores["domains"]["chat"], bits / 17, rtol=1e-5)


def test_where_nothing_is_scored_there_is_no_score(model):
  ids = np.arange(9, dtype=np.int32)
  asked = types.SimpleNamespace(ids=ids, num_bytes=9, scored=np.zeros(10, bool), scored_bytes=0)
  text = evaluate(*model, {"text": DOCUMENTS[:2]}, (EOD, EOD), (4, L))
  both = evaluate(*model, {"chat": [asked], "text": DOCUMENTS[:2]}, (EOD, EOD), (4, L))
  assert both["domains"] == {"chat": None, **text["domains"]}
  assert both["bits_per_byte"] == text["bits_per_byte"]
  assert sum(both["routing"]["0"]["counts"]["chat"]) == 0
  none = evaluate(*model, {"chat": [asked]}, (EOD, EOD), (4, L))
  assert none == {"bits_per_byte": None, "domains": {"chat": None}, "routing": {}}


def test_windows_without_a_scored_token_are_left_out():
  ids, mask = np.arange(40, dtype=np.int32), np.zeros(41, bool)
  mask[[3, 30]] = True
  windows = list(document_windows(ids, (EOD, EOD), L, mask))
  assert [labels[labels >= 0].tolist() for _, labels in windows] == [[3], [30]]
  assert all(len(given) == len(labels) == L for given, labels in windows)


def test_a_window_goes_into_the_open_row_if_it_fits_and_every_batch_has_full_shape():
  sizes = [3, 4, 1, 8, 5, 4, 2, 2]
  full = lambda size, value: np.full(size, value, np.int32)  # noqa: E731
  windows = [(full(size, i + 1), full(size, 50 + i)) for i, size in enumerate(sizes)]
  batches = list(packed_batches(iter(windows), 2, L))
  rows = [row for batch in batches for row in batch["ids"]]
  expected = [[1] * 3 + [2] * 4 + [3], [4] * 8, [5] * 5 + [0] * 3, [6] * 4 + [7] * 2 + [8] * 2]
  np.testing.assert_array_equal(rows, expected)
  assert all(array.shape == (2, L) for batch in batches for array in batch.values())
  first = batches[0]
  np.testing.assert_array_equal(first["segment"][0], [1, 1, 1, 2, 2, 2, 2, 3])
  np.testing.assert_array_equal(first["position"][0], [0, 1, 2, 0, 1, 2, 3, 0])
  np.testing.assert_array_equal(batches[1]["labels"][0], [54] * 5 + [-1] * 3)
  np.testing.assert_array_equal(batches[1]["segment"][0], [1] * 5 + [0] * 3)


def test_no_window_makes_no_batch():
  assert list(packed_batches(iter(()), 2, L)) == []


def sized(*sizes):
  return [types.SimpleNamespace(num_bytes=size, index=index) for index, size in enumerate(sizes)]


@pytest.mark.parametrize("budget", [1, 10, 35, 100, 10_000])
def test_first_documents_are_within_the_budget_in_order_and_the_same_each_time(budget):
  documents = sized(*np.random.default_rng(0).integers(10, 60, 40).tolist())
  chosen = first_documents(documents, budget)
  indices = [each.index for each in chosen]
  assert indices == sorted(set(indices))
  assert chosen == first_documents(documents, budget)
  assert sum(each.num_bytes for each in chosen) <= budget or len(chosen) == 1
  left = budget - sum(each.num_bytes for each in chosen)
  rest = [each.num_bytes for each in documents if each.index not in indices]
  assert not rest or left < min(rest), "another document would have fitted"


def test_first_documents_takes_the_smallest_where_none_fits():
  assert [each.index for each in first_documents(sized(50, 20, 30), 10)] == [1]


def test_first_documents_are_spread_over_all():
  chosen = first_documents(sized(*[10] * 1000), 200)
  gaps = np.diff([each.index for each in chosen])
  assert len(chosen) == 20
  assert gaps.max() <= 3 * 50
  assert gaps.min() >= 10


def test_the_routing_of_each_layer_counts_the_choices_of_every_valid_token_by_domain(model):
  decoder, params = model
  domains = {"a": DOCUMENTS[:2], "b": DOCUMENTS[2:]}
  found = evaluate(decoder, params, domains, (EOD, EOD), (3, L))["routing"]
  assert found.keys() == {"0", "1"}
  for layer in found.values():
    for name, documents in domains.items():
      windows = [w for each in documents for w in document_windows(each.ids, (EOD, EOD), L)]
      tokens = sum(len(inputs) for inputs, _ in windows)
      assert sum(layer["counts"][name]) == 2 * tokens, "two experts a token, padding none"
    assert 0 <= layer["mutual_information"] <= 1
    assert layer["shuffled_95"][0] <= layer["shuffled_95"][1]


def test_compressors_see_a_domain_as_one_stream_and_leave_out_what_is_scored_in_part():
  texts = [b"abc" * 50, b"abc" * 50]
  whole = [types.SimpleNamespace(raw=raw, scored=None) for raw in texts]
  part = [types.SimpleNamespace(raw=texts[0], scored=np.array([True, False]))]
  found = compressors({"whole": whole, "part": [*whole, *part]})
  assert found == {
    "gzip -9": {"whole": 8 * len(gzip.compress(texts[0] * 2, 9)) / 300},
    "xz -9": {"whole": 8 * len(lzma.compress(texts[0] * 2, preset=9)) / 300},
  }
  empty = [types.SimpleNamespace(raw=b"", scored=None)]
  assert compressors({"empty": empty}) == {"gzip -9": {}, "xz -9": {}}


def test_compressors_of_a_slice_are_charged_what_it_adds_to_the_stream_of_the_rest():
  rng = np.random.default_rng(0)
  texts = [rng.integers(0, 256, 400, np.uint8).tobytes() for _ in range(3)]
  texts.append(texts[0])
  documents = [types.SimpleNamespace(raw=raw, scored=None) for raw in texts]
  part, rest = {"a": documents[3:]}, b"".join(texts[:3])
  found = {name: of["a"] for name, of in compressors(part, {"a": documents}).items()}
  for name, size in (
    ("gzip -9", lambda data: len(gzip.compress(data, 9))),
    ("xz -9", lambda data: len(lzma.compress(data, preset=9))),
  ):
    assert found[name] == 8 * (size(rest + texts[3]) - size(rest)) / 400
    assert found[name] < 2 < 8 < compressors(part)[name]["a"], "it has been seen before"
  near = compressors(part, {"a": documents}, most=800)
  assert all(of["a"] > 7 for of in near.values()), "the text that it repeats is too far back"
  assert compressors({"a": documents}, {"a": documents}) == compressors({"a": documents})


@pytest.fixture
def shapes(monkeypatch):
  """Returns the shape of each batch that is scored from now on, none of which is computed."""
  found = []

  def no_rows(decoder, params, batch):
    found.append(batch["ids"].shape)
    return np.zeros(len(batch["ids"])), {0: np.zeros((len(batch["ids"]), 4))}

  def no_tokens(decoder, params, batch):
    found.append(batch["ids"].shape)
    return np.zeros(batch["ids"].shape)

  monkeypatch.setattr(module, "score_rows", no_rows)
  monkeypatch.setattr(multiple_choice, "score_tokens", no_tokens)
  return found


def test_every_batch_that_is_scored_is_a_sign_of_life(model, shapes):
  beats = []
  for fitted in (True, False):
    evaluate(*model, {"a": DOCUMENTS}, (EOD, EOD), (2, L), lambda: beats.append(1), fitted)
  assert len(beats) == len(shapes)
  windows = [w for each in DOCUMENTS for w in document_windows(each.ids, (EOD, EOD), L)]
  full = list(packed_batches(iter(windows), 2, L))
  assert shapes[-len(full) :] == [(2, L)] * len(full)


def test_a_short_text_in_a_long_context_computes_its_tokens_alone(model, shapes):
  domains = {"a": [document(2_500, 0)], "b": [document(30, 1), document(9, 2)]}
  evaluate(*model, domains, (EOD, EOD), (16, 4096))
  tokens = 2_501 + 31 + 10
  assert sum(rows * length for rows, length in shapes) <= 1.3 * tokens
  assert len(set(shapes)) <= 4


def test_questions_compute_no_more_than_their_tokens(model, shapes):
  answers = ("x", "y" * 200)
  questions = [multiple_choice.Question("?" * (at * 7), answers, 0) for at in range(20)]
  encode = lambda text: np.array([ord(letter) % EOD for letter in text], np.int32)  # noqa: E731
  tokenizer = types.SimpleNamespace(start_id=EOD, encode=encode, encode_prompt=encode)
  multiple_choice.score_questions(*model, tokenizer, questions, (16, 2048))
  tokens = sum(len(each.question) + len(answer) for each in questions for answer in answers)
  assert sum(rows * length for rows, length in shapes) <= 1.3 * tokens
  assert len(set(shapes)) <= 4


ELSEWHERE = {
  "a mask over documents": {"mask": CausalMask()},
  "capacity": {"dispatch": Capacity(1.0)},
  "einsum": {"dispatch": Einsum(1.0)},
  "experts that choose": {"router": ExpertChoice(always=True, allow_future=True)},
  "places": {"router": Balanced()},
}


@pytest.mark.parametrize("fields", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_what_depends_on_its_neighbours_is_scored_in_full_batches(decoder_of, fields):
  fields = dict(fields)
  mask = fields.pop("mask", DocumentMask())
  model = decoder_of(**fields).config
  change = lambda block: dataclasses.replace(  # noqa: E731
    block, attention=dataclasses.replace(block.attention, mask=mask)
  )
  group = dataclasses.replace(model.stack[0], pattern=tuple(map(change, model.stack[0].pattern)))
  assert scored_alone(decoder_of().config)
  assert not scored_alone(dataclasses.replace(model, stack=(group,)))


@pytest.mark.parametrize(
  ("rope", "least"),
  [
    (PlainRope(), 1),
    (DynamicRope(original=16), 32),
    (DynamicRope(original=32), 1),
    (LongRope((1.0, 1.1), (1.0, 2.0), original=8), 9),
    (LongRope((1.0, 1.1), (1.0, 2.0), original=32), 1),
  ],
)
def test_no_row_is_so_short_that_angles_are_others(decoder_of, shapes, rope, least):
  model = decoder_of().config
  (block,) = model.stack[0].pattern
  block = dataclasses.replace(block, attention=dataclasses.replace(block.attention, rope=rope))
  group = dataclasses.replace(model.stack[0], pattern=(block,))
  decoder = Decoder(dataclasses.replace(model, stack=(group,)), VOCAB)
  evaluate(decoder, None, {"a": [document(4, 0)]}, (EOD, EOD), (2, 32))
  assert shapes == [(1, max(least, 5))]
