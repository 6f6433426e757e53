"""Rotary frequencies of each public scaling, one pair of channels at a time, in float64."""

import math

from jaxmoe.models.rope_scaling import (
  DynamicRope,
  LinearRope,
  Llama3Rope,
  LongRope,
  PlainRope,
  Yarn,
)


def plain(rope, theta, size, pair, length):
  return theta ** (-2 * pair / size)


def linear(rope, theta, size, pair, length):
  """Chen et al. 2023, equation 4: positions are divided."""
  return plain(rope, theta, size, pair, length) / rope.factor


def dynamic(rope, theta, size, pair, length):
  """NTK-aware: the base that makes the slowest pair `factor * length / original` as slow."""
  if length <= rope.original:
    return plain(rope, theta, size, pair, length)
  slower = rope.factor * length / rope.original - rope.factor + 1
  return plain(rope, theta * slower ** (size / (size - 2)), size, pair, length)


def llama3(rope, theta, size, pair, length):
  """By wavelength, as the released code has it."""
  turn = plain(rope, theta, size, pair, length)
  wavelength = 2 * math.pi / turn
  if wavelength < rope.original / rope.high:
    return turn
  if wavelength > rope.original / rope.low:
    return turn / rope.factor
  smooth = (rope.original / wavelength - rope.low) / (rope.high - rope.low)
  return (1 - smooth) * turn / rope.factor + smooth * turn


def yarn(rope, theta, size, pair, length):
  """Peng et al. 2023, equations 17 to 20; the ramp is over pairs, as released."""

  def pair_of(turns):
    return size * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

  first, last = pair_of(rope.fast), pair_of(rope.slow)
  if rope.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, size - 1)
  slowed = min(max((pair - first) / (last - first), 0), 1)
  turn = plain(rope, theta, size, pair, length)
  return (1 - slowed) * turn + slowed * turn / rope.factor


def longrope(rope, theta, size, pair, length):
  factors = rope.long if length > rope.original else rope.short
  return plain(rope, theta, size, pair, length) / factors[pair]


TURNS = {
  PlainRope: plain, LinearRope: linear, DynamicRope: dynamic, Llama3Rope: llama3,
  Yarn: yarn, LongRope: longrope,
}  # fmt: skip


def gain(rope, length):
  """Peng et al. 2023, equation 22; Ding et al. 2024, section 3.3."""
  if isinstance(rope, Yarn):
    magnitude = lambda m: 1 + 0.1 * m * math.log(rope.factor)  # noqa: E731
    if rope.attention_factor:
      return rope.attention_factor
    return magnitude(rope.mscale) / magnitude(rope.mscale_all) if rope.mscale else magnitude(1)
  if isinstance(rope, LongRope):
    given = rope.long_gain if length > rope.original else rope.short_gain
    return given or math.sqrt(1 + math.log(rope.factor) / math.log(rope.original))
  return 1.0


def angles(rope, theta, size, length):
  """The frequency of each pair, and the gain."""
  of_pair = TURNS[type(rope)]
  turns = [of_pair(rope, theta, size, pair, length) for pair in range(size // 2)]
  return turns, gain(rope, length)
