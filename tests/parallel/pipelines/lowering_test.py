import dataclasses

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines import (
  PIPELINES,
  Action,
  Table,
  Vocabulary,
  forward_only,
  lower,
  straight,
  v_shape,
  with_vocabulary,
)
from jaxmoe.parallel.pipelines.columns_replay import ReplayError, replay
from jaxmoe.parallel.pipelines.csv_notation import parse_table
from jaxmoe.parallel.pipelines.table_checks import check_table
from jaxmoe.parity.cells import table_with_again

SIZES = [(1, 1), (1, 3), (2, 2), (2, 5), (3, 4), (4, 4), (4, 9)]


def passes_of(table):
  return sorted(
    (part.stage, part.kind, part.micro)
    for order in table.orders
    for action in order
    for part in action.parts
  )


@pytest.mark.parametrize("keep", ["input", "residuals"])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("size", SIZES)
def test_columns_do_what_their_table_says_and_find_what_they_look_for(name, size, keep):
  table = PIPELINES[name](*size)
  check_table(table)
  done = replay(lower(table, keep))
  assert sorted((one.stage, one.kind, one.micro) for one in done) == passes_of(table)


@pytest.mark.parametrize("spread", [None, Vocabulary(1), Vocabulary(2)])
def test_residuals_that_are_made_again_are_read_where_they_were_made(spread):
  table = parse_table(table_with_again(3, 5), "again")
  table = table if spread is None else with_vocabulary(table, spread)
  columns = lower(table)
  done = replay(columns)
  assert sorted((one.stage, one.kind, one.micro) for one in done) == passes_of(table)
  firsts = [(one.tick, one.micro) for one in done if (one.stage, one.kind) == (0, "BW")]
  unembedded = [(int(at), int(columns.unembed[at])) for at in np.flatnonzero(columns.unembed >= 0)]
  assert unembedded == (firsts if spread else [])
  assert columns.slots.kept == 1 and columns.slots.inputs >= 2


@pytest.mark.parametrize(
  "placement", [straight(1), straight(3), straight(4, 2), v_shape(2), v_shape(4)]
)
def test_forward_tables_take_every_microbatch_through_every_stage_and_keep_nothing(placement):
  table = forward_only(placement, 5)
  check_table(table)
  columns = lower(table)
  assert sorted((one.stage, one.micro) for one in replay(columns)) == [
    (stage, micro) for stage in range(placement.num_stages) for micro in range(5)
  ]
  assert columns.slots.kept == columns.slots.grads == 0 and (columns.f_kept == -1).all()


def test_one_f_one_b_keeps_p_microbatches_however_many_there_are():
  for num_micro in (4, 8, 32):
    assert lower(PIPELINES["1f1b"](4, num_micro), "residuals").slots.kept == 4
    assert lower(PIPELINES["gpipe"](4, num_micro), "residuals").slots.kept == num_micro


@pytest.mark.parametrize("name", ["f_input", "b_input", "b_grad"])
def test_a_slot_that_is_not_the_right_one_is_seen(name):
  columns = lower(PIPELINES["1f1b"](3, 5))
  array = getattr(columns, name).copy()
  array[array >= 0] = (array[array >= 0] + 1) % 3
  with pytest.raises(ReplayError, match="is looked for"):
    replay(dataclasses.replace(columns, **{name: array}))


def test_a_slot_that_is_written_a_tick_early_is_seen():
  columns = lower(PIPELINES["1f1b"](3, 5))
  first = columns.channels[0]
  slots = first.slot_PK.copy()
  slots[slots >= 0] = 0
  with pytest.raises(ReplayError, match="is looked for"):
    replay(
      dataclasses.replace(
        columns, channels=(dataclasses.replace(first, slot_PK=slots), *columns.channels[1:])
      )
    )


def test_a_message_that_nobody_keeps_is_seen():
  columns = lower(PIPELINES["gpipe"](3, 4))
  first = columns.channels[0]
  channels = (dataclasses.replace(first, slot_PK=np.full_like(first.slot_PK, -1)),)
  with pytest.raises(ReplayError, match="a message that comes and slot -1"):
    replay(dataclasses.replace(columns, channels=(*channels, *columns.channels[1:])))


def test_devices_that_wait_for_each_other_are_told_in_one_line():
  first = (Action(0, "F", 0), Action(0, "BW", 0), Action(0, "F", 1), Action(0, "BW", 1))
  second = (Action(1, "F", 1), Action(1, "F", 0), Action(1, "BW", 0), Action(1, "BW", 1))
  with pytest.raises(InputError, match=r"device 0.*, pass 2, 0BW0: a deadlock: it waits for 1BW0"):
    check_table(Table(straight(2), 2, (first, second)))


@pytest.mark.parametrize(
  "order, message",
  [
    ([Action(1, "F", 0)], "stage 1 lies on device 1"),
    ([Action(0, "F", 7)], "there are microbatches 0 to 0"),
    ([Action(2, "F", 0)], "there are stages 0 to 1"),
    ([Action(-1, "S", 0)], "has no S or T"),
    ([Action(0, "F", 0), Action(0, "B", 0)], "pass 2, 0B0: 0W0 is missing"),
    ([Action(0, "F", 0), Action(0, "F", 0)], "pass 2, 0F0: it is done before, as pass 1"),
    ([Action(0, "F", 0), Action(0, "BW", 0), Action(0, "W", 0)], "0BW0 makes that gradient"),
  ],
)
def test_a_table_that_is_none_is_told_in_one_line(order, message):
  second = (Action(1, "F", 0), Action(1, "BW", 0))
  with pytest.raises(InputError, match=message) as found:
    check_table(Table(straight(2), 1, (tuple(order), second)))
  assert "\n" not in str(found.value)
