import dataclasses

import pytest

from configs.tiny import get_config
from jaxmoe.core.errors import InputError
from jaxmoe.parallel import Parallel
from jaxmoe.parallel.pipelines import PIPELINES, lower
from jaxmoe.parity.cells import AGAIN
from jaxmoe.plan.advice_text import pipeline_text
from jaxmoe.plan.pipeline_summary import pipeline_summary, sent_bytes


def recipe(num_micro=4, **degrees):
  found = get_config()
  return dataclasses.replace(
    found,
    parallel=Parallel(**degrees),
    train=dataclasses.replace(found.train, batch_size=4, num_micro=num_micro),
  )


def test_a_pipeline_is_told_with_its_rivals():
  found = pipeline_summary(recipe(pipe=2), 259, 1024)
  assert found.own.pipeline == "1f1b" and found.own.ticks == 2 * 4 + 2
  assert {table.pipeline for table in found.rivals} == set(PIPELINES) - {"1f1b"}
  # (p - 1) of m + p - 1 units idle; in flight p.
  assert found.own.bubble == pytest.approx(1 / 5) and found.own.in_flight == 2
  assert found.own.time == pytest.approx(1 / (1 - found.own.bubble))
  assert all(table.time_in_ticks >= table.time for table in (found.own, *found.rivals))
  lines = list(pipeline_text(found))
  assert any("zb_v" in line for line in lines) and all(len(line) <= 80 for line in lines)


def test_flops_of_all_passes_are_those_of_training_with_one_forward_more():
  experiment = recipe(pipe=2)
  found = pipeline_summary(experiment, 259, 1024)
  model, length = experiment.model, experiment.data.seq_len
  head = 6.0 * model.dim * 259
  step = (model.train_flops_per_token(259, length) - head) * length
  stages = len(found.stages)
  assert stages * found.flops["BW"] == pytest.approx(step)
  assert found.flops["B"] + found.flops["W"] == found.flops["BW"]


def test_what_is_kept_or_made_again_in_a_pass_of_its_own_is_no_flop_of_a_backward_pass():
  found, kept, again = (
    pipeline_summary(recipe(pipe=2, **how), 259, 1024)
    for how in ({}, {"keep": "residuals"}, {"pipeline": AGAIN})
  )
  forward = found.flops["F"]
  for other in (kept, again):
    assert other.flops["BW"] == pytest.approx(found.flops["BW"] - forward)
  assert again.flops["R"] == forward and "R" not in kept.flops
  # What waits for its gradient meanwhile makes its stage again: a step is no longer than with BW.
  assert again.own.bubble < found.own.bubble
  assert kept.own.slots["kept"] == 2 and found.own.slots["kept"] == 0
  assert all(len(line) <= 80 for line in pipeline_text(kept))


@pytest.mark.parametrize("head, passes", (("one_barrier", (2, 1)), ("two_barriers", (1, 3))))
def test_a_head_over_all_devices_has_passes_of_its_own(head, passes):
  experiment = recipe(pipe=2, head=head)
  found = pipeline_summary(experiment, 259, 1024)
  product = 2.0 * experiment.data.seq_len * experiment.model.dim * 259
  assert (found.flops["S"], found.flops["T"]) == tuple(each * product / 2 for each in passes)
  assert found.own.slots["vocabulary"] == {"one_barrier": 1, "two_barriers": 2}[head]
  # In flight p + 1 with one barrier, p + 2 with two.
  assert found.own.in_flight == {"one_barrier": 3, "two_barriers": 4}[head]
  sums = {"one_barrier": 4, "two_barriers": 5}[head]
  assert found.summed == 4 * sums * 1024  # a ring of two sends all that is summed
  assert {table.pipeline for table in found.rivals} == set(PIPELINES) - {"1f1b"}
  lines = list(pipeline_text(found))
  assert any("vocabulary, a device" in line for line in lines)
  assert all(len(line) <= 80 for line in lines)


def test_permutes_send_the_stream_every_tick_in_both_directions():
  straight = lower(PIPELINES["1f1b"](3, 6))
  assert sent_bytes(straight, 100) == {"right": 1600, "left": 1600}
  # Both flows of a V go both ways, and turn within the last device.
  turned = lower(PIPELINES["zb_v"](3, 6))
  assert sent_bytes(turned, 100) == dict.fromkeys(("right", "left"), 200 * turned.num_ticks)


def test_there_is_none_without_a_pipeline_and_a_bad_one_is_one_line():
  assert pipeline_summary(recipe(), 259, 1024) is None
  with pytest.raises(InputError, match="at least one layer"):
    pipeline_summary(recipe(pipe=4), 259, 1024)
