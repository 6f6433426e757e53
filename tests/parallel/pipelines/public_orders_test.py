"""Orders of F and B beside those of torch.distributed.pipelining, weight gradients aside."""

import types

import pytest

from jaxmoe.parallel.pipelines import PIPELINES

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


def theirs(name, num_devices, num_micro):
  """Returns by device what torch does: (kind, stage, microbatch), an overlap as two."""
  num_stages = 2 * num_devices
  placed = PIPELINES[name](num_devices, num_micro).placement
  own = [asked_stage(index, num_stages, num_devices) for index in placed.stages_on(0)]
  made = getattr(schedules, THEIRS[name])(own, num_micro, loss_fn=lambda *_: None)
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
  words = {"F": "FORWARD", "B": "BACKWARD_INPUT", "BW": "FULL_BACKWARD"}
  return [
    [
      (words[part.kind], part.stage, part.micro)
      for action in order
      for part in action.parts
      if part.kind != "W"
    ]
    for order in PIPELINES[name](num_devices, num_micro).orders
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
