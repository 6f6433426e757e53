"""What every collective of the gradient program sends, by the formulas of its layout.

Read from the lowered program, in which nothing is merged, moved or widened yet. All leaves divide,
so that the formulas are exact; only sums of metrics are set apart, a few numbers each.
"""

import collections
import dataclasses
import math

import pytest

from jaxmoe.core.backends import Chooser, Devices
from jaxmoe.hlo.stablehlo import collectives_of_lowered
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.moe.dispatch import DISPATCHERS, EXCHANGES
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.parallel import Parallel
from tests.multidevice.programs import decoder_of, lower_gradients

ROWS, LENGTH, DIM, VOCAB, LAYERS = 8, 16, 64, 512, 3
HIDDEN, EXPERTS, ACTIVE, NARROW = 128, 8, 2, 16
TOKENS, FLOAT = ROWS * LENGTH, 4
NORMS = FLOAT * 2 * DIM
ATTENTION = FLOAT * 4 * DIM * DIM
DENSE = NORMS + ATTENTION + FLOAT * 3 * DIM * HIDDEN
ROUTED = FLOAT * EXPERTS * 3 * DIM * NARROW
OUTSIDE = FLOAT * (2 * VOCAB * DIM + DIM)
ALL = LAYERS * DENSE + OUTSIDE
STREAM = FLOAT * TOKENS * DIM
FEED_FORWARD = MLPConfig(HIDDEN)
TOLD = FLOAT * LAYERS * EXPERTS  # the largest sum that is of a metric


def sent(parallel, ffn=FEED_FORWARD, micro=1, key_heads=8, **settings):
  """Returns the bytes a device sends by kind and axes, metrics apart, and all collectives."""
  block = BlockConfig(SoftmaxAttention(num_heads=8, num_kv_heads=key_heads, head_dim=8), ffn)
  decoder = decoder_of(block, LAYERS, DIM, VOCAB, **settings)
  found = collectives_of_lowered(*lower_gradients(decoder, parallel, (ROWS, LENGTH), micro))
  assert all(one.known and not one.sometimes for one in found)
  total, told = collections.Counter(), 0.0
  for one in found:
    if one.kind == "all-reduce" and one.bytes_out <= TOLD:
      told += one.total_wire_bytes
    else:
      total[one.kind, one.over] += one.total_wire_bytes
  assert told < 0.05 * total.total()
  return dict(total), found


def share(degree):
  """What of its output a device sends in a gather; half of what it sends in an all-reduce."""
  return (degree - 1) / degree


ZERO = {
  "ZeRO 0 sums whole gradients": (
    Parallel(fsdp=4, zero=0), 1, {("all-reduce", "fsdp"): 2 * share(4) * ALL},
  ),
  "ZeRO 1 scatters once": (
    Parallel(fsdp=4, zero=1), 1, {("reduce-scatter", "fsdp"): share(4) * ALL},
  ),
  "ZeRO 1 scatters once for two microbatches": (
    Parallel(fsdp=4, zero=1), 2, {("reduce-scatter", "fsdp"): share(4) * ALL},
  ),
  "ZeRO 2 scatters every microbatch": (
    Parallel(fsdp=4, zero=2), 2, {("reduce-scatter", "fsdp"): 2 * share(4) * ALL},
  ),
  "ZeRO 3 gathers layers for both passes": (
    Parallel(fsdp=4, zero=3), 1, {
      ("all-gather", "fsdp"): share(4) * (2 * LAYERS * DENSE + OUTSIDE),
      ("reduce-scatter", "fsdp"): share(4) * ALL,
    },
  ),
  "ZeRO 3 does so every microbatch": (
    Parallel(fsdp=4, zero=3), 2, {
      ("all-gather", "fsdp"): 2 * share(4) * (2 * LAYERS * DENSE + OUTSIDE),
      ("reduce-scatter", "fsdp"): 2 * share(4) * ALL,
    },
  ),
  "replicas of ZeRO 3 sum shards": (
    Parallel(data=2, fsdp=2, zero=3), 1, {
      ("all-gather", "fsdp"): share(2) * (2 * LAYERS * DENSE + OUTSIDE),
      ("reduce-scatter", "fsdp"): share(2) * ALL,
      ("all-reduce", "data"): 2 * share(2) * ALL / 2,
    },
  ),
  "replicas of ZeRO 2 sum shards once": (
    Parallel(data=2, fsdp=2, zero=2), 2, {
      ("reduce-scatter", "fsdp"): 2 * share(2) * ALL,
      ("all-reduce", "data"): 2 * share(2) * ALL / 2,
    },
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", ZERO)
def test_state_is_sharded_with_the_bytes_of_its_stage(name):
  parallel, micro, expected = ZERO[name]
  assert sent(parallel, micro=micro)[0] == pytest.approx(expected, rel=1e-6)


# Two products of a layer, and embedding or head, end in a sum in each pass.
SUMS = 2 * (2 * LAYERS + 1)
LOSS = 5 * FLOAT * TOKENS  # top, mass and right logit; the last two again on the way back
WHOLE = LAYERS * NORMS + FLOAT * DIM  # leaves that all devices of a tensor group hold
TENSOR = {
  "an all-reduce at the end of each pair": (
    Parallel(tensor=4), {("all-reduce", "tensor"): 2 * share(4) * (SUMS * STREAM + LOSS + WHOLE)},
  ),
  "its two halves with the sequence spread": (
    Parallel(tensor=4, sequence=True), {
      ("all-gather", "tensor"): share(4) * SUMS * STREAM,
      ("reduce-scatter", "tensor"): share(4) * SUMS * STREAM,
      ("all-reduce", "tensor"): 2 * share(4) * (LOSS + WHOLE),
    },
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSOR)
def test_tensor_groups_send_activations_and_numbers_of_the_loss(name):
  parallel, expected = TENSOR[name]
  total, found = sent(parallel)
  assert total == pytest.approx(expected, rel=1e-6)
  # Nothing of size T x V moves, in no part: the largest is the stream.
  assert DIM < VOCAB // 4 and max(one.bytes_out for one in found) == STREAM
  assert sum(one.times for one in found if one.shape == (TOKENS,)) == 5


def test_a_stream_that_is_kept_in_parts_is_gathered_once_a_layer():
  parallel = Parallel(tensor=4)
  whole, _ = sent(parallel, remat="full")
  parts, _ = sent(dataclasses.replace(parallel, partition_activations=True), remat="full")
  assert parts.pop(("all-gather", "tensor")) == share(4) * LAYERS * STREAM
  assert parts == whole


def test_key_heads_fewer_than_devices_are_held_and_summed_by_all():
  keys_and_values = LAYERS * FLOAT * 2 * DIM * 2 * 8
  assert sent(Parallel(tensor=4), key_heads=2)[0] == pytest.approx({
    ("all-reduce", "tensor"): 2 * share(4) * (SUMS * STREAM + LOSS + WHOLE + keys_and_values),
  }, rel=1e-6)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Moved:
  """How rows are exchanged among `degree` devices; `rows` are sent to each by one swap."""

  parallel: Parallel
  dispatch: str = "dropless"
  exchange: str = "all_to_all"
  rows: float = ACTIVE  # as a multiple of a device's tokens

  @property
  def tokens(self):
    return TOKENS / self.parallel.num_token_groups / (
      self.parallel.tensor if "tensor" in self.parallel.fold else 1
    )

  @property
  def ffn(self):
    return MoEConfig(
      EXPERTS, ACTIVE, experts=SwiGLU(NARROW), dispatch=DISPATCHERS[self.dispatch][1],
      exchange=EXCHANGES[self.exchange][1],
    )

  @property
  def swaps(self):
    """Rows go and return, and their gradients do the same."""
    return LAYERS * 4 * FLOAT * self.rows * self.tokens * DIM

  @property
  def sizes(self):
    """How many rows each device sends to each expert."""
    return LAYERS * 4 * EXPERTS if self.dispatch == "dropless" else 0


FOUR, TWO = Parallel(expert=4), Parallel(data=2, expert=2, fold=("data",))
PER_EXPERT = math.ceil(1.25 * TOKENS / 4 * ACTIVE / EXPERTS) * EXPERTS / 4 / (TOKENS / 4)
SWAPPED = {
  "all-to-all": Moved(FOUR),
  "all-to-all with room for twice the mean": Moved(FOUR, exchange="all_to_all_bounded", rows=1),
  "all-to-all in pieces": Moved(FOUR, exchange="all_to_all_chunked"),
  "ragged all-to-all without a platform for it": Moved(FOUR),
  "all-to-all of capacity": Moved(FOUR, "capacity", rows=PER_EXPERT),
  "all-to-all of capacity by products": Moved(FOUR, "einsum", rows=PER_EXPERT),
  "all-to-all of everything": Moved(FOUR, "dense", rows=EXPERTS / 4),
}


def shared_grads(parallel):
  """Bytes of the gradients that all devices share, and of those of experts here."""
  gates = FLOAT * LAYERS * DIM * EXPERTS
  return LAYERS * (NORMS + ATTENTION) + gates + OUTSIDE, LAYERS * ROUTED / parallel.expert_degree


@pytest.mark.parametrize("name", SWAPPED)
def test_rows_go_to_their_experts_and_back_twice(name):
  moved = SWAPPED[name]
  dense, _ = shared_grads(FOUR)
  asked = (("exchange", "ragged"),) if name.startswith("ragged") else ()
  total, found = sent(FOUR, moved.ffn, chooser=Chooser(names=asked, strict=False))
  assert total == pytest.approx({
    ("all-to-all", "expert"): share(4) * (4 * moved.swaps + moved.sizes),
    ("all-reduce", "expert"): 2 * share(4) * dense,
  }, rel=1e-6)  # fmt: skip
  pieces = 2 if "pieces" in name else 1
  rows = [one for one in found if one.kind == "all-to-all" and one.dtype == "f32"]
  assert sum(one.times for one in rows) == 4 * LAYERS * pieces


def test_two_levels_send_the_same_rows_on_each():
  moved = Moved(TWO, exchange="all_to_all_two_level")
  dense, _ = shared_grads(TWO)
  total, _ = sent(TWO, moved.ffn)
  assert total == pytest.approx({
    ("all-to-all", "expert"): share(2) * 4 * moved.swaps,
    ("all-to-all", "data"): share(2) * 4 * moved.swaps,
    ("all-to-all", "data,expert"): share(4) * moved.sizes,
    ("all-reduce", "data,expert"): 2 * share(4) * dense,
  }, rel=1e-6)  # fmt: skip


def test_one_level_sends_rows_straight_to_folded_devices():
  dense, _ = shared_grads(TWO)
  moved = Moved(TWO)
  assert sent(TWO, moved.ffn)[0] == pytest.approx({
    ("all-to-all", "data,expert"): share(4) * (4 * moved.swaps + moved.sizes),
    ("all-reduce", "data,expert"): 2 * share(4) * dense,
  }, rel=1e-6)  # fmt: skip


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_all_gather_moves_tokens_whatever_the_number_of_choices(dispatch):
  moved = Moved(FOUR, dispatch, "all_gather")
  dense, _ = shared_grads(FOUR)
  weights = LAYERS * FLOAT * TOKENS * ACTIVE  # and as many ids
  # Which choices count: without drops that is the same in all layers, and asked for once.
  valid = TOKENS * ACTIVE * (1 if dispatch == "dropless" else LAYERS)
  assert sent(FOUR, moved.ffn)[0] == pytest.approx({
    ("all-gather", "expert"): share(4) * (2 * LAYERS * STREAM + 2 * weights + valid),
    ("reduce-scatter", "expert"): share(4) * (2 * LAYERS * STREAM + weights),
    ("all-reduce", "expert"): 2 * share(4) * dense,
  }, rel=1e-6)  # fmt: skip


def test_experts_and_their_replicas_sum_gradients_over_different_devices():
  parallel = Parallel(data=2, fsdp=2, expert=2, zero=3)
  moved = Moved(parallel)
  dense, routed = shared_grads(parallel)
  assert sent(parallel, moved.ffn)[0] == pytest.approx({
    ("all-to-all", "expert"): share(2) * (2 * moved.swaps + moved.sizes),
    ("all-gather", "fsdp"): share(2) * (2 * (dense + routed) - OUTSIDE),
    ("reduce-scatter", "fsdp"): share(2) * (dense + routed),
    ("all-reduce", "data,expert"): 2 * share(4) * dense / 2,
    ("all-reduce", "data"): 2 * share(2) * routed / 2,
  }, rel=1e-6)  # fmt: skip


def test_folded_tensor_groups_share_their_tokens_among_experts():
  parallel = Parallel(expert=2, tensor=2, fold=("tensor",))
  moved = Moved(parallel)
  dense, _ = shared_grads(parallel)
  gates = FLOAT * LAYERS * DIM * EXPERTS
  halves = (dense - WHOLE - gates) / 2
  stream = STREAM / 2
  # Attention ends in a sum in both passes; so does the embedding; experts end in a gather.
  sums = 2 * LAYERS + 2
  assert sent(parallel, moved.ffn)[0] == pytest.approx({
    ("all-to-all", "expert,tensor"): share(4) * (4 * moved.swaps + moved.sizes),
    ("all-gather", "tensor"): share(2) * LAYERS * stream,
    ("reduce-scatter", "tensor"): share(2) * LAYERS * stream,
    ("all-reduce", "tensor"): 2 * share(2) * (sums * stream + LOSS / 2),
    ("all-reduce", "expert"): 2 * share(2) * halves,
    ("all-reduce", "expert,tensor"): 2 * share(4) * (WHOLE + gates),
  }, rel=1e-6)  # fmt: skip


def test_a_ragged_exchange_has_room_for_all_rows_and_moves_nothing_else():
  moved = Moved(FOUR)
  chooser = Chooser(Devices("tpu"), (("exchange", "ragged"), ("expert_mlp", "reference")))
  total, found = sent(FOUR, moved.ffn, chooser=chooser)
  rows = FLOAT * ACTIVE * moved.tokens * DIM
  # Results have room for the rows of all devices there, and for a device's own when they return.
  room = LAYERS * 2 * (4 * rows + rows)
  assert total["ragged-all-to-all", "expert"] == pytest.approx(share(4) * room)
  assert sum(one.times for one in found if one.kind == "ragged-all-to-all") == 4 * LAYERS
  # Beside it go sizes, and where to put rows: a number a device, twice back for each gradient.
  places = LAYERS * 5 * 4 * 4
  assert total["all-to-all", "expert"] == pytest.approx(share(4) * (moved.sizes + places))
