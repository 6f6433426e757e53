import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.tokens import Tokens
from jaxmoe.models.masks import MASKS, CausalMask, DocumentMask, WindowMask

MEMBERS = {
  **{name: instance for name, (_, instance) in MASKS.items()},
  "window of one": WindowMask(size=1),
  "window wider than the row": WindowMask(size=100),
}
member = pytest.mark.parametrize("mask", MEMBERS.values(), ids=MEMBERS.keys())
# Rows: two documents and padding at the end; padding between; padding before and inside, numbers
# that fall; one document; nothing at all.
SEGMENT = np.array(
  [
    [1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [1, 1, 1, 0, 0, 2, 2, 2, 3, 3, 3],
    [0, 0, 7, 0, 7, 7, 0, 0, 2, 0, 2], [1] * 11, [0] * 11,
  ]
)  # fmt: skip
SEES = {
  DocumentMask: lambda mask, query, key: query["segment"] == key["segment"],
  WindowMask: lambda mask, query, key: (
    query["segment"] == key["segment"] and query["slot"] - key["slot"] < mask.size
  ),
  CausalMask: lambda mask, query, key: True,
}


def tokens_of(segment, position=None):
  segment = np.asarray(segment)
  slot = np.broadcast_to(np.arange(segment.shape[1]), segment.shape)
  position = slot if position is None else position
  return Tokens(*(jnp.asarray(field, jnp.int32) for field in (0 * slot, position, segment, slot)))


def dense(mask, query, key):
  return np.asarray(mask(query, key).dense())


def oracle(mask, segment):
  """Returns who sees whom, pair by pair: never what comes later, never padding."""
  rows, length = segment.shape
  seen = np.zeros((rows, length, length), bool)
  for row, query, key in np.ndindex(seen.shape):
    of = [{"slot": slot, "segment": segment[row, slot]} for slot in (query, key)]
    allowed = key <= query and of[0]["segment"] > 0 and of[1]["segment"] > 0
    seen[row, query, key] = allowed and SEES[type(mask)](mask, *of)
  return seen


def test_every_mask_has_an_oracle():
  assert {cls for cls, _ in MASKS.values()} == SEES.keys()


@member
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_mask_equals_its_definition_pair_by_pair(mask, jit):
  tokens = tokens_of(SEGMENT)
  seen = (jax.jit(mask.__call__) if jit else mask)(tokens, tokens).dense()
  assert seen.dtype == bool
  np.testing.assert_array_equal(seen, oracle(mask, SEGMENT))


@member
def test_a_token_sees_itself_and_nothing_later_and_padding_sees_and_is_seen_by_nothing(mask):
  tokens = tokens_of(SEGMENT)
  seen, valid = dense(mask, tokens, tokens), SEGMENT > 0
  np.testing.assert_array_equal(np.diagonal(seen, axis1=1, axis2=2), valid)
  assert not np.triu(seen, 1).any()
  assert not seen[~valid].any() and not seen.swapaxes(1, 2)[~valid].any()


@member
def test_queries_apart_from_their_keys_see_what_they_see_together(mask):
  tokens = tokens_of(SEGMENT)
  queries = jax.tree.map(lambda field: field[:, 5:7], tokens)
  np.testing.assert_array_equal(dense(mask, queries, tokens), dense(mask, tokens, tokens)[:, 5:7])


@member
def test_what_padding_holds_changes_nothing(mask):
  tokens = tokens_of(SEGMENT)
  odd = tokens_of(SEGMENT, np.where(SEGMENT > 0, np.asarray(tokens.position), 12345))
  np.testing.assert_array_equal(dense(mask, odd, odd), dense(mask, tokens, tokens))


@member
def test_empty_slots_of_a_cache_are_seen_by_nothing(mask):
  tokens = tokens_of(np.ones((1, 4)))
  nothing = jax.tree.map(jnp.zeros_like, tokens)
  assert not dense(mask, tokens, nothing).any()


def test_only_the_causal_mask_crosses_documents():
  tokens, crosses = tokens_of(SEGMENT), {}
  other = SEGMENT[:, :, None] != SEGMENT[:, None, :]
  for name, mask in MEMBERS.items():
    crosses[name] = bool((dense(mask, tokens, tokens) & other).any())
  assert [name for name, crossed in crosses.items() if crossed] == ["causal"]


@member
@pytest.mark.parametrize("cut", [slice(0, 4), slice(4, 9), slice(9, 11)])
def test_a_sight_of_a_part_of_the_keys_is_that_part_of_the_sight(mask, cut):
  tokens = tokens_of(SEGMENT)
  sight = mask(tokens, tokens)
  part = dataclasses.replace(sight, slot_BS=sight.slot_BS[:, cut])
  np.testing.assert_array_equal(part.dense(), oracle(mask, SEGMENT)[:, :, cut])
  # In another order, too: a key is known by its slot.
  part = dataclasses.replace(sight, slot_BS=sight.slot_BS[:, ::-1])
  np.testing.assert_array_equal(part.dense(), oracle(mask, SEGMENT)[:, :, ::-1])


def test_a_document_that_has_the_number_of_an_earlier_one_is_another():
  tokens = tokens_of([[1, 1, 2, 1, 1]])
  seen = dense(DocumentMask(), tokens, tokens)[0]
  np.testing.assert_array_equal(seen.sum(axis=1), [1, 2, 1, 1, 2])


@member
def test_a_query_that_found_no_room_in_a_cache_of_another_document_sees_nothing_of_it(mask):
  tokens = tokens_of([[3, 3, 3, 3]])
  late = Tokens(*(jnp.full((1, 1), value) for value in (0, 4, 4, 4)))
  crosses = isinstance(mask, CausalMask)
  assert dense(mask, late, tokens).any() == crosses
