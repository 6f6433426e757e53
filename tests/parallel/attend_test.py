"""Rows over context devices: every strategy and order finds what one device does, and is finite."""

import dataclasses
import functools
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxmoe.core.backends import HERE
from jaxmoe.core.tokens import Tokens
from jaxmoe.hlo.stablehlo import collectives_of_lowered
from jaxmoe.models.attention import softmax_parts
from jaxmoe.models.masks import CausalMask, DocumentMask, WindowMask
from jaxmoe.models.stick_breaking_attention import stick_parts
from jaxmoe.parallel.attend import ATTEND, ContextGroup
from jaxmoe.parallel.block_order import Order, order_batch
from jaxmoe.parallel.context_rows import spread_rows, tokens_before

N, LENGTH, HEADS, KEY_HEADS, SIZE = 4, 32, 4, 2, 3
TWENTY = np.repeat(np.arange(1, 21), [2] * 12 + [1] * 8)
SEGMENT = np.stack([
  np.r_[np.ones(20), np.full(4, 2), np.zeros(8)],  # the last device has padding alone
  np.ones(32),  # one document lies on all
  np.r_[1, np.zeros(31)],  # one token
  TWENTY,
]).astype(np.int32)  # fmt: skip
SINK = np.array([0.3, -1.0, 0.5, 2.0], np.float32)
MASKS = {"document": DocumentMask(), "window": WindowMask(size=3), "causal": CausalMask()}
GROUP = ContextGroup("context", N, True)
ORDERS = typing.get_args(Order)
CASES = [
  *itertools.product(ATTEND, ["plain"], MASKS),
  *itertools.product(ATTEND, ["zigzag", "balanced"], ["document"]),
  ("ring", "zigzag", "window"),
]


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(HEADS, SIZE), (KEY_HEADS, SIZE), (KEY_HEADS, SIZE)]
  return tuple(rng.normal(size=(*SEGMENT.shape, *of)).astype(np.float32) for of in shapes)


def laid(order, given):
  """Returns queries, keys, values, slots and segments in order of devices."""
  batch = order_batch({"segment": SEGMENT}, N, order)
  at = batch["slot"][:, :, None, None]
  return tuple(np.take_along_axis(x, at, axis=1) for x in given), batch["slot"], batch["segment"]


def spread(attend, order, mask, kind="softmax", weigh=None, permutes=True):
  """Returns the jitted function of arrays in order of devices, and of the sink."""
  mesh = Mesh(np.array(jax.devices()[:N]), ("context",), axis_types=(AxisType.Auto,))
  group = GROUP._replace(in_order=order == "plain", permutes=permutes)

  def on_device(q, k, v, slot, segment, sink):
    tokens = Tokens(slot, slot, segment, slot)
    if order == "plain":
      here = jnp.arange(slot.shape[1], dtype=jnp.int32)
      tokens = dataclasses.replace(tokens, slot=jnp.broadcast_to(here, slot.shape))
    tokens = spread_rows(tokens, "context", order == "plain")
    parts = softmax_parts(HERE, 0.7, sink) if kind == "softmax" else stick_parts(HERE)
    return ATTEND[attend](parts, (q, k, v), tokens, MASKS[mask], group)

  rows = PartitionSpec(None, "context")
  run = jax.shard_map(
    on_device, mesh=mesh, in_specs=(*[rows] * 5, PartitionSpec()), out_specs=rows, check_vma=False
  )
  if weigh is None:
    return jax.jit(run)

  def both(q, k, v, slot, segment, sink, weight):
    found, pull = jax.vjp(lambda q, k, v: run(q, k, v, slot, segment, sink), q, k, v)
    return found, pull(weight.astype(found.dtype))

  return jax.jit(both)


def seen(mask, row, query, key):
  same = SEGMENT[row, query] == SEGMENT[row, key] or mask == "causal"
  near = query - key < 3 or mask != "window"
  valid = SEGMENT[row, query] > 0 and SEGMENT[row, key] > 0
  return key <= query and same and near and valid


@functools.cache
def right(mask):
  """Softmax with a sink, a float64 loop; gradients of the sum of its outputs times `weights`."""
  q, k, v = (x.astype(np.float64) for x in arrays())
  out = np.zeros_like(q)
  for row, n, at in itertools.product(range(len(SEGMENT)), range(HEADS), range(LENGTH)):
    keys = [key for key in range(LENGTH) if seen(mask, row, at, key)]
    if keys:
      head = n // (HEADS // KEY_HEADS)
      score = np.exp(0.7 * k[row, keys, head] @ q[row, at, n])
      out[row, at, n] = score @ v[row, keys, head] / (score.sum() + np.exp(SINK[n]))
  return out


@functools.cache
def one_device(mask, kind="softmax"):
  """Returns what one device finds, and its gradients."""
  slot = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), SEGMENT.shape)
  tokens = Tokens(slot, slot, jnp.asarray(SEGMENT), slot)
  parts = softmax_parts(HERE, 0.7, SINK) if kind == "softmax" else stick_parts(HERE)
  sight = MASKS[mask](tokens, tokens)
  found, pull = jax.vjp(lambda q, k, v: parts.attend(q, k, v, sight), *map(jnp.asarray, arrays()))
  return found, pull(jnp.asarray(arrays(5)[0]))


@functools.cache
def program(attend, order, mask, kind="softmax"):
  return spread(attend, order, mask, kind, weigh=True)


def found_of(attend, order, mask, kind="softmax", given=None):
  given = arrays() if given is None else given
  (q, k, v, weight), slot, segment = laid(order, (*given, arrays(5)[0]))
  found = program(attend, order, mask, kind)(q, k, v, slot, segment, SINK, weight)
  back = np.argsort(slot, axis=1)[:, :, None, None]
  return jax.tree.map(lambda x: np.take_along_axis(np.asarray(x), back, axis=1), found)


@pytest.mark.parametrize("attend, order, mask", CASES)
def test_a_strategy_finds_what_one_device_does_and_is_finite(attend, order, mask):
  out, grads = found_of(attend, order, mask)
  np.testing.assert_allclose(out, right(mask), rtol=1e-4, atol=2e-6)
  for mine, true in zip(grads, one_device(mask)[1], strict=True):
    assert np.isfinite(mine).all()
    np.testing.assert_allclose(mine, true, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("attend, order", [
  ("ring", "plain"), ("token_ring", "plain"), ("gather", "balanced"), ("ulysses", "zigzag"),
])  # fmt: skip
def test_a_stick_is_broken_along_the_devices_as_on_one(attend, order):
  out, grads = found_of(attend, order, "document", "stick")
  true_out, true_grads = one_device("document", "stick")
  np.testing.assert_allclose(out, true_out, rtol=1e-4, atol=2e-6)
  for mine, true in zip(grads, true_grads, strict=True):
    np.testing.assert_allclose(mine, true, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("attend, order", [*itertools.product(ATTEND, ORDERS)])
def test_the_last_quarter_of_a_row_leaves_what_is_before_it_as_it_was_bit_for_bit(attend, order):
  before, after = arrays(), arrays(1)
  changed = tuple(np.concatenate([x[:, :24], y[:, 24:]], axis=1) for x, y in zip(before, after))
  out, other = (found_of(attend, order, "document", given=given)[0] for given in (before, changed))
  np.testing.assert_array_equal(out[:, :24], other[:, :24])
  assert not np.array_equal(out[:, 24:], other[:, 24:])


def sent(attend, mask="document", dtype=jnp.float32):
  """Returns the bytes of each permute and exchange of the forward program, by kind and distance."""
  given, slot, segment = laid("plain", arrays())
  q, k, v = (jnp.asarray(x, dtype) for x in given)
  lowered = spread(attend, "plain", mask).lower(q, k, v, slot, segment, SINK)
  mesh = Mesh(np.array(jax.devices()[:N]), ("context",), axis_types=(AxisType.Auto,))
  return [one for one in collectives_of_lowered(lowered, mesh) if one.total_wire_bytes]


PART = 4 * SEGMENT.shape[0] * LENGTH // N  # bytes of a number of each token of a part


def permuted(attend, mask="document", dtype=jnp.float32):
  found = sent(attend, mask, dtype)
  return sorted(one.total_wire_bytes for one in found if one.kind == "collective-permute")


def test_a_ring_sends_n_less_1_parts_of_keys_and_values():
  assert permuted("ring") == [PART * KEY_HEADS * SIZE] * 2 * (N - 1)


def test_a_window_stops_the_ring_after_the_hops_it_needs():
  assert permuted("ring", "window") == [PART * KEY_HEADS * SIZE] * 2


def test_a_token_ring_sends_queries_and_returns_what_they_found_with_its_log_sum_exp():
  queries, found = PART * HEADS * SIZE, (PART * HEADS, PART * HEADS * SIZE)
  assert permuted("token_ring") == sorted([queries, *found] * (N - 1))


def test_all_but_log_sum_exps_is_sent_in_the_dtype_of_queries():
  assert permuted("ring", dtype=jnp.bfloat16) == [PART * KEY_HEADS * SIZE // 2] * 2 * (N - 1)
  one_way = PART * HEADS * SIZE // 2
  right = sorted([one_way, one_way, PART * HEADS] * (N - 1))
  assert permuted("token_ring", dtype=jnp.bfloat16) == right


@pytest.mark.parametrize("attend", ["ring", "token_ring"])
@pytest.mark.parametrize("kind", ["softmax", "stick_breaking"])
def test_in_bfloat16_a_strategy_is_as_near_as_one_device_is(attend, kind):
  narrow = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays())
  wide = tuple(np.asarray(x, np.float32) for x in narrow)
  found, exact = (
    found_of(name, "plain", "document", kind, given)
    for name, given in ((attend, narrow), ("gather", wide))
  )
  one = found_of("gather", "plain", "document", kind, narrow)
  for mine, theirs, true in zip(*map(jax.tree.leaves, (found, one, exact)), strict=True):
    errors = [np.abs(np.asarray(x, np.float32) - true).mean() for x in (mine, theirs)]
    assert 0 < errors[0] < 2 * errors[1]


@pytest.mark.parametrize("attend", ATTEND)
def test_in_stages_of_a_pipeline_nothing_is_a_permute(attend):
  (q, k, v), slot, segment = laid("plain", arrays())
  run = spread(attend, "plain", "document", permutes=False)
  mesh = Mesh(np.array(jax.devices()[:N]), ("context",), axis_types=(AxisType.Auto,))
  found = collectives_of_lowered(run.lower(q, k, v, slot, segment, SINK), mesh)
  assert not [one for one in found if one.kind == "collective-permute"]
  if attend == "ring":
    out = run(q, k, v, slot, segment, SINK)
    np.testing.assert_allclose(out, right("document"), rtol=1e-4, atol=2e-6)


def test_ulysses_exchanges_heads_for_tokens_and_repeats_the_key_heads_that_are_fewer():
  found = [one.total_wire_bytes for one in sent("ulysses") if one.kind == "all-to-all"]
  assert found == [PART * HEADS * SIZE * (N - 1) / N] * 4


def test_tokens_before_a_part_are_those_of_the_devices_before_it():
  x = np.arange(1, 13, dtype=np.int32).reshape(1, 12)
  mesh = Mesh(np.array(jax.devices()[:N]), ("context",), axis_types=(AxisType.Auto,))
  rows = PartitionSpec(None, "context")

  def before(number, group=GROUP):
    run = jax.shard_map(
      lambda x: tokens_before(x, number, group), mesh=mesh, in_specs=rows, out_specs=rows,
      check_vma=False,
    )  # fmt: skip
    return np.asarray(jax.jit(run)(x)).reshape(N, number).tolist()

  assert before(2) == [[0, 0], [2, 3], [5, 6], [8, 9]]
  assert before(2, GROUP._replace(permutes=False)) == before(2)
  assert before(4) == [[0, 0, 0, 0], [0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
