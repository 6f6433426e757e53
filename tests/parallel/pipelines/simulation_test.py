import pytest

from jaxmoe.parallel.pipelines import PIPELINES, Action, Table, straight
from jaxmoe.parallel.pipelines.simulation import Durations, simulate, simulate_ticks

SIZES = [(2, 2), (2, 7), (3, 6), (4, 4), (4, 13), (5, 15), (8, 16)]


@pytest.mark.parametrize("size", SIZES)
def test_one_f_one_b_idles_as_published_and_holds_p_microbatches(size):
  durations = Durations(forward=1.0, both=2.5)
  made = simulate(PIPELINES["1f1b"](*size), durations)
  assert made.idle == pytest.approx([(size[0] - 1) * 3.5] * size[0])
  assert made.in_flight == tuple(range(size[0], 0, -1))


@pytest.mark.parametrize("size", SIZES)
def test_zb_h1_takes_its_ticks_and_no_more_memory_than_one_f_one_b(size):
  num_devices, num_micro = size
  table = PIPELINES["zb_h1"](*size)
  for made in (simulate(table, Durations()), simulate_ticks(table, Durations())):
    assert made.time == 3 * num_micro + num_devices - 1
    assert max(made.in_flight) == num_devices


@pytest.mark.parametrize("size", SIZES)
def test_v_half_holds_half_of_one_f_one_b(size):
  assert max(simulate(PIPELINES["v_half"](*size), Durations()).in_flight) == (size[0] + 2) // 2


@pytest.mark.parametrize("overlapped", [1.0, 0.9, 0.8])
@pytest.mark.parametrize("weights", [1.0, 0.6])
@pytest.mark.parametrize("num_devices", [2, 3, 4, 6])
def test_dualpipe_v_idles_as_published_where_an_input_gradient_takes_as_long_as_a_forward(
  num_devices, weights, overlapped
):
  """DeepSeek-V3, table 2: (PP / 2 - 1)(F&B + B - 3 W), PP = 2 p, B whole, of who idles most."""
  both = 1.0 + weights
  side_by_side = (1.0 + both) * overlapped
  durations = Durations(weights=weights, overlapped=side_by_side)
  made = simulate(PIPELINES["dualpipe_v"](num_devices, 2 * num_devices + 3), durations)
  published = (num_devices - 1) * (side_by_side + both - 3 * weights)
  assert max(made.idle) == pytest.approx(published)


@pytest.mark.parametrize("backward, published, found", [(1.2, 2.4, 2.2), (0.9, 2.1, 2.2)])
def test_dualpipe_v_idles_otherwise_where_it_does_not(backward, published, found):
  """Then it is (p - 1)(F&B + F - 2 W): at the turn a device waits for forward passes, not B."""
  durations = Durations(backward=backward, weights=0.9, overlapped=3.0)
  made = simulate(PIPELINES["dualpipe_v"](2, 6), durations)
  assert 3.0 + backward + 0.9 - 2.7 == pytest.approx(published)
  assert max(made.idle) == pytest.approx(found) == pytest.approx(3.0 + 1.0 - 1.8)


def test_a_tick_takes_as_long_as_its_longest_pass():
  """On 2 devices 1F1B has 2 m + 2 ticks, of which only the first and the last are of one kind."""
  table = PIPELINES["1f1b"](2, 4)
  durations = Durations(forward=1.0, both=3.0)
  assert simulate(table, durations).time == 4 * 4.0 + 4.0
  ticks = [1, 1, 3, 3, 3, 3, 3, 3, 3, 3]
  assert simulate_ticks(table, durations).time == sum(ticks)


def test_a_message_takes_its_hop_between_devices_and_none_on_one():
  forward = (Action(0, "F", 0), Action(0, "BW", 0))
  table = Table(straight(2), 1, (forward, (Action(1, "F", 0), Action(1, "BW", 0))))
  assert simulate(table, Durations(hop=0.25)).time == 6.5
  assert simulate(PIPELINES["gpipe"](1, 2), Durations(hop=0.25)).time == 6.0


def test_a_stage_that_takes_twice_as_long_sets_the_pace():
  table = PIPELINES["1f1b"](3, 8)
  made = simulate(table, Durations(both=2.0, scale=(1.0, 1.0, 2.0)))
  assert made.busy == (24.0, 24.0, 48.0)
  # The last stage waits for the first microbatch, and its last gradient goes back.
  assert made.time == 2 * 1.0 + 48.0 + 2 * 2.0


def test_what_is_in_flight_is_counted_by_the_share_of_a_stage():
  made = simulate(PIPELINES["interleaved"](2, 4), Durations())
  assert made.in_flight == (2.5, 1.5)


def test_a_bubble_is_the_share_of_time_without_a_pass():
  made = simulate(PIPELINES["gpipe"](3, 6), Durations(both=2.0))
  assert made.bubble == pytest.approx(2 / (6 + 2))
