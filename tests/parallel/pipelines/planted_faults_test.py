"""Faults planted in tables and their lowering: each is seen before anything is compiled."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines import PIPELINES, Vocabulary, lower, lowering, with_vocabulary
from jaxmoe.parallel.pipelines.columns_replay import ReplayError, replay
from jaxmoe.parallel.pipelines.slots import assign_slots
from jaxmoe.parallel.pipelines.table_checks import check_table


@pytest.mark.parametrize("keep", ["input", "residuals"])
@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "gpipe"])
def test_a_slot_freed_a_tick_early_is_seen(name, keep, monkeypatch):
  """Of gpipe nothing is written once slots are freed: a tick less is no fault there."""

  def early(stays):
    return assign_slots([dataclasses.replace(stay, last_read=stay.last_read - 1) for stay in stays])

  table = PIPELINES[name](4, 9)
  replay(lower(table, keep))
  monkeypatch.setattr(lowering, "assign_slots", early)
  with pytest.raises(ReplayError, match=r"is looked for|are both written"):
    replay(lower(table, keep))


def test_one_column_for_two_messages_is_seen():
  """Both routes of a V's forward messages in one column: the one that turned back is lost."""
  columns = lower(PIPELINES["zb_v"](3, 6))
  right, left = (
    next(c for c in columns.channels if (c.flow, c.route) == ("forward", route))
    for route in ("right", "left")
  )
  merged = dataclasses.replace(
    right,
    sends_PK=right.sends_PK | left.sends_PK,
    slot_PK=np.where(right.slot_PK >= 0, right.slot_PK, left.slot_PK),
  )
  others = tuple(c for c in columns.channels if c is not right and c is not left)
  with pytest.raises(ReplayError):
    replay(dataclasses.replace(columns, channels=(merged, *others)))


@pytest.mark.parametrize("name", ["zb_h1", "zb_v", "v_half", "dualpipe_v"])
def test_a_weight_gradient_that_is_dropped_is_seen(name):
  table = PIPELINES[name](4, 9)
  orders = tuple(tuple(a for a in order if (a.kind, a.micro) != ("W", 8)) for order in table.orders)
  with pytest.raises(InputError, match="W8 is missing"):
    check_table(dataclasses.replace(table, orders=orders))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_head_gradient_past_the_step_is_seen(name):
  table = with_vocabulary(PIPELINES[name](4, 9), Vocabulary(2))
  orders = tuple(tuple(a for a in order if (a.kind, a.micro) != ("T", 8)) for order in table.orders)
  with pytest.raises(InputError, match="T8 is missing"):
    check_table(dataclasses.replace(table, orders=orders))
