"""Orders of F and B beside those of torch.distributed.pipelining, weight gradients aside."""

import csv
import types

import pytest

from jaxmoe.parallel.pipelines import PIPELINES
from jaxmoe.parallel.pipelines.csv_notation import read_table, write_table

schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
pytestmark = pytest.mark.filterwarnings("ignore")

THEIRS = {
  "interleaved": "ScheduleInterleaved1F1B",
  "zb_v": "ScheduleZBVZeroBubble",
  "dualpipe_v": "ScheduleDualPipeV",
}


def asked_stage(index, num_stages, num_devices):
  """Returns what a schedule asks of a stage of device 0 before anything runs."""
  return types.SimpleNamespace(
    stage_index=index,
    num_stages=num_stages,
    group_rank=0,
    group_size=num_devices,
    has_backward=True,
    is_first=index == 0,
    is_last=index == num_stages - 1,
    group=None,
    submod=None,
  )


def schedule(name, num_devices, num_micro):
  """Returns the schedule of torch; it makes the orders of all devices."""
  num_stages = 2 * num_devices
  placed = PIPELINES[name](num_devices, num_micro).placement
  own = [asked_stage(index, num_stages, num_devices) for index in placed.stages_on(0)]
  return getattr(schedules, THEIRS[name])(own, num_micro, loss_fn=lambda *_: None)


def theirs(name, num_devices, num_micro):
  """Returns by device what torch does: (kind, stage, microbatch), an overlap as two."""
  made = schedule(name, num_devices, num_micro)
  orders = []
  for device in range(num_devices):
    actions = [action for action in made.pipeline_order[device] if action is not None]
    parts = [part for action in actions for part in (action.sub_actions or (action,))]
    orders.append(
      [
        (part.computation_type.name, part.stage_index, part.microbatch_index)
        for part in parts
        if part.computation_type.name != "BACKWARD_WEIGHT"
      ]
    )
  return orders


def ours(name, num_devices, num_micro):
  """Returns by device what our table does, in their words."""
  return passes_of(PIPELINES[name](num_devices, num_micro))


def passes_of(table):
  """Returns by device what a table does, in the words of torch."""
  words = {"F": "FORWARD", "B": "BACKWARD_INPUT", "BW": "FULL_BACKWARD"}
  return [
    [
      (words[part.kind], part.stage, part.micro)
      for action in order
      for part in action.parts
      if part.kind != "W"
    ]
    for order in table.orders
  ]


@pytest.mark.parametrize("num_devices", range(2, 9))
@pytest.mark.parametrize("name", THEIRS)
def test_orders_are_those_of_torch_wherever_torch_has_one(name, num_devices):
  compared = 0
  for num_micro in range(num_devices, 4 * num_devices + 1):
    try:
      expected = theirs(name, num_devices, num_micro)
    except ValueError as error:
      assert "microbatches" in str(error), error
      continue
    assert ours(name, num_devices, num_micro) == expected
    compared += 1
  assert compared >= 4


@pytest.mark.parametrize("name", THEIRS)
def test_a_file_that_torch_writes_is_read(name, tmp_path):
  path = str(tmp_path / "torch.csv")
  schedule(name, 3, 6)._dump_csv(path, "compute_only")
  table = read_table(path)
  assert (table.placement, table.num_micro) == (PIPELINES[name](3, 6).placement, 6)
  assert passes_of(table) == ours(name, 3, 6)


@pytest.mark.parametrize("name", THEIRS)
def test_a_file_that_we_write_is_read_by_torch(name, tmp_path):
  path = tmp_path / "ours.csv"
  path.write_text(write_table(PIPELINES[name](3, 6)))
  with open(path) as file:
    actions = [[schedules._Action.from_str(cell) for cell in row] for row in csv.reader(file)]
  assert [[str(action) for action in row] for row in actions] == [
    line.split(",") for line in path.read_text().splitlines()
  ]
