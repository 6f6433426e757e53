"""What every scaling of rotary angles owes: its definition's numbers, and those of transformers."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.rope_scaling import (
  ROPES,
  DynamicRope,
  LinearRope,
  Llama3Rope,
  LongRope,
  PlainRope,
  Yarn,
)
from tests.contracts.oracles import ropes

SIZE, THETA = 8, 1e4
FACTORS = ROPES["longrope"][1]
MEMBERS = {
  **{name: instance for name, (_, instance) in ROPES.items()},
  "yarn of gpt-oss": Yarn(32.0, 4096, truncate=False),
  "yarn of DeepSeek-V3": Yarn(40.0, 4096, mscale=1.0, mscale_all=1.0),
  "yarn of DeepSeek-V2-Lite": Yarn(40.0, 4096, mscale=0.707, mscale_all=0.5),
  "yarn, a gain given": Yarn(4.0, 64, fast=16.0, slow=2.0, attention_factor=1.3),
  "longrope, gains given": dataclasses.replace(FACTORS, short_gain=1.2, long_gain=1.25),
  "llama3, closer": Llama3Rope(4.0, low=0.5, high=8.0, original=32),
}
member = pytest.mark.parametrize("name", MEMBERS)


def found(rope, theta=THETA, size=SIZE, length=16):
  return np.asarray(rope.frequencies(theta, size, length)), rope.gain(length)


def test_every_scaling_has_an_oracle():
  assert {cls for cls, _ in ROPES.values()} == ropes.TURNS.keys()


@member
@pytest.mark.parametrize("length", [4, 8, 9, 1000])
@pytest.mark.parametrize("theta", [THETA, 150_000.0])
def test_frequencies_and_gain_equal_the_definition(name, length, theta):
  turns, gain = found(MEMBERS[name], theta, SIZE, length)
  right, right_gain = ropes.angles(MEMBERS[name], theta, SIZE, length)
  np.testing.assert_allclose(turns, right, rtol=2e-6)  # float32
  assert gain == pytest.approx(right_gain, rel=1e-12)


@member
def test_no_pair_turns_faster_and_slow_ones_turn_slower_in_long_rows(name):
  turns, plain = found(MEMBERS[name], length=64)[0], found(PlainRope())[0]
  assert (turns <= plain * (1 + 1e-6)).all()
  if name != "plain":
    assert turns[-1] < plain[-1] / 1.5


def test_only_dynamic_and_longrope_look_at_the_length_and_only_past_the_original():
  looks = set()
  for name, (_, rope) in ROPES.items():
    short, same, long = (found(rope, length=length)[0] for length in (3, 8, 9))
    np.testing.assert_array_equal(short, same)
    if (same != long).any():
      looks.add(name)
  assert looks == {"dynamic", "longrope"}


@member
def test_rows_from_the_least_length_that_is_alike_on_turn_alike_and_shorter_ones_do_not(name):
  rope = MEMBERS[name]
  for length in (4, 8, 9, 1000):
    least = rope.least_alike(length)
    assert 1 <= least <= length
    turns, gain = found(rope, length=length)
    for other in (least, (least + length) // 2):
      np.testing.assert_array_equal(found(rope, length=other)[0], turns)
      assert found(rope, length=other)[1] == gain
    if least > 1:
      assert (found(rope, length=least - 1)[0] != turns).any()


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: LinearRope(0.0), "factor must be above 0"),
    (lambda: DynamicRope(original=0), "original must be above 0"),
    (lambda: Yarn(fast=1.0, slow=1.0), "fast must be above slow"),
    (lambda: Yarn(mscale=-1.0), "mscale must be above 0"),
    (lambda: Llama3Rope(low=4.0), "high must be above low"),
    (lambda: LongRope((1.0,), (0.0,)), "factors must be above 0"),
    (lambda: SoftmaxAttention(head_dim=6, rope=FACTORS), "factor for each of the 3 pairs"),
    (lambda: SoftmaxAttention(head_dim=2, rope=DynamicRope()), "two pairs"),
  ],
)
def test_what_cannot_be_is_refused(make, message):
  with pytest.raises(InputError, match=message):
    make()


def public(rope, theta, longest):
  """Returns the `rope_parameters` of a config and its `max_position_embeddings`."""
  given = {field.name: getattr(rope, field.name) for field in dataclasses.fields(rope)}
  names = {
    "original": "original_max_position_embeddings", "fast": "beta_fast", "slow": "beta_slow",
    "mscale_all": "mscale_all_dim", "low": "low_freq_factor", "high": "high_freq_factor",
    "short": "short_factor", "long": "long_factor",
  }  # fmt: skip
  fields = {names.get(name, name): value for name, value in given.items() if value is not None}
  fields = {name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items() if not name.endswith("gain")}  # fmt: skip
  (kind,) = (name for name, (cls, _) in ROPES.items() if cls is type(rope))
  return {"rope_theta": theta, "rope_type": kind, **fields}, longest


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in MEMBERS if "gains given" not in name])
@pytest.mark.parametrize("length", [6, 100])
def test_they_are_those_of_transformers(name, length):
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from transformers import LlamaConfig
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  rope = MEMBERS[name]
  if type(rope) is PlainRope:
    pytest.skip("transformers has it in each model")
  parameters, longest = public(rope, THETA, getattr(rope, "original", 64))
  config = LlamaConfig(
    hidden_size=4 * SIZE, num_attention_heads=4, head_dim=SIZE, rope_parameters=parameters,
    max_position_embeddings=longest,
  )  # fmt: skip
  turns, gain = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None, seq_len=length)
  ours, our_gain = found(rope, length=length)
  np.testing.assert_allclose(ours, turns.numpy(), rtol=2e-6)
  assert our_gain == pytest.approx(gain, rel=1e-6)
