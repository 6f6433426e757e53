import collections
import dataclasses

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines import PIPELINES, Vocabulary, forward_only, lower, straight
from jaxmoe.parallel.pipelines.columns_replay import replay
from jaxmoe.parallel.pipelines.csv_notation import read_table, write_table
from jaxmoe.parallel.pipelines.simulation import Durations, simulate, true_spans
from jaxmoe.parallel.pipelines.table_checks import check_table
from jaxmoe.parallel.pipelines.vocabulary_passes import with_vocabulary

ALGORITHMS = (1, 2)
CLOCKS = ("ticks", "true")
SOME = [(2, 2), (2, 7), (3, 5), (4, 8), (5, 12)]
ALL = [(size, micro) for size in range(2, 9) for micro in range(size, 4 * size + 1)]


def check(name, size, algorithm, clock):
  """Checks a table with its head, and that all devices do S and T of one microbatch at once."""
  table = with_vocabulary(PIPELINES[name](*size), Vocabulary(algorithm), clock)
  check_table(table)
  columns = lower(table, "residuals")
  ticks = collections.defaultdict(set)
  for one in replay(columns):
    if one.kind in ("S", "T"):
      ticks[one.kind, one.micro].add((one.device, one.tick))
  assert set(ticks) == {(kind, micro) for kind in "ST" for micro in range(size[1])}
  for places in ticks.values():
    assert sorted(device for device, _ in places) == list(range(size[0]))
    assert len({tick for _, tick in places}) == 1
  for ordered in (columns.embed, columns.unembed):
    assert sorted(ordered[ordered >= 0]) == list(range(size[1]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", SOME, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", PIPELINES)
def test_every_table_takes_a_head_over_all_devices(name, size, algorithm):
  for clock in CLOCKS:
    check(name, size, algorithm, clock)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", PIPELINES)
def test_every_table_takes_a_head_over_all_devices_for_all_sizes(name, algorithm):
  for size in ALL:
    for clock in CLOCKS:
      check(name, size, algorithm, clock)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "gpipe"])
def test_a_barrier_costs_one_microbatch_in_flight(name, algorithm, clock):
  table, durations = PIPELINES[name](4, 16), Durations(scores=0.4, head_weights=0.2)
  before = max(simulate(table, durations).in_flight)
  vocabulary = Vocabulary(algorithm)
  after = max(simulate(with_vocabulary(table, vocabulary, clock), durations).in_flight)
  assert after == before + vocabulary.barriers == before + (3 - algorithm)


@pytest.mark.parametrize("size", [(4, 16), (8, 32)])
@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb_h1"])
def test_with_one_barrier_the_bubble_stays(name, size):
  table, durations = PIPELINES[name](*size), Durations(scores=0.4, head_weights=0.2)
  made = simulate(with_vocabulary(table, Vocabulary(2), "true"), durations)
  assert max(made.idle) == pytest.approx(max(simulate(table, durations).idle))


def test_in_ticks_a_head_adds_its_own_and_those_of_one_interval():
  """1F1B has 2 m + 2 (p - 1) ticks; S and T add 2 m, and nothing waits for the barrier."""
  table = with_vocabulary(PIPELINES["1f1b"](4, 16), Vocabulary(2))
  assert lower(table).num_ticks == 2 * 16 + 2 * 3 + 2 * 16


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_passes_of_the_head_are_evenly_spaced_and_wait_for_each_other(algorithm):
  table = with_vocabulary(PIPELINES["1f1b"](4, 16), Vocabulary(algorithm), "true")
  durations = Durations(scores=1.0, head_weights=1.0)
  ends, starts = {}, {}
  for device, row in enumerate(true_spans(table, durations)):
    for start, end, action in row:
      if action.kind in ("S", "T"):
        ends[action.kind, action.micro] = max(end, ends.get((action.kind, action.micro), 0.0))
      starts[device, action.stage, action.kind, action.micro] = start
  for micro in range(16):
    gradient = "T" if algorithm == 1 else "S"
    assert starts[3, 3, "BW", micro] >= ends[gradient, micro]
    assert all(starts[device, -1, "T", micro] >= ends["S", micro] for device in range(4))
  steady = [starts[0, -1, "S", micro] for micro in range(4, 12)]
  assert len(set(np.diff(steady))) == 1


def test_a_head_pass_that_comes_too_late_or_never_is_told():
  table = with_vocabulary(PIPELINES["1f1b"](2, 3), Vocabulary(2))
  orders = tuple(
    tuple(action for action in order if (action.kind, action.micro) != ("T", 2))
    for order in table.orders
  )
  with pytest.raises(InputError, match="T2 is missing; it is due before the step"):
    check_table(dataclasses.replace(table, orders=orders))
  late = tuple(
    tuple(sorted(order, key=lambda action: action.kind == "T")) for order in table.orders
  )
  assert all(order[-3:] == late[0][-3:] for order in late)
  check_table(dataclasses.replace(table, orders=late))


def test_devices_with_other_orders_of_the_head_are_told():
  table = with_vocabulary(PIPELINES["1f1b"](2, 2), Vocabulary(2))
  order = [action for action in table.orders[0] if action.stage < 0][::-1]
  other = tuple(order.pop(0) if action.stage < 0 else action for action in table.orders[0])
  with pytest.raises(InputError, match="a deadlock"):
    check_table(dataclasses.replace(table, orders=(other, table.orders[1])))


def test_forward_tables_get_their_logits_only():
  table = with_vocabulary(forward_only(straight(3), 4), Vocabulary(2))
  check_table(table)
  kinds = {action.kind for order in table.orders for action in order}
  assert kinds == {"F", "S"}
  columns = lower(table)
  assert columns.slots.vocabulary == columns.slots.grads == 0
  shared = [one.micro for one in replay(columns) if (one.device, one.kind) == (2, "S")]
  assert shared == [0, 1, 2, 3]


def test_a_head_over_all_devices_goes_through_a_file(tmp_path):
  table = with_vocabulary(PIPELINES["zb_h1"](2, 4), Vocabulary(2))
  path = tmp_path / "table.csv"
  path.write_text(write_table(table))
  assert read_table(str(path), Vocabulary(2)) == table
