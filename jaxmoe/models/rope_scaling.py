"""RoPE scaling: rotary frequencies, and how they are stretched for longer texts.

A record is asked for `frequencies` and a `gain` of what is turned. `length` is how many tokens a
row has room for (of a batch in training, of the cache in generation), known before anything
compiles: where frequencies depend on it, all tokens of a row have the same, so that a later token
never changes an earlier one, and what is cached stays right. To add one, add a line to ROPES.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.ops import rope


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """The base of records of frequencies, which override `stretch`."""

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
        raise InputError(f"{field.name} must be above 0: {field.name}={value}")

  def check(self, size: int) -> None:
    """Refuses a number of channels that turn which the record cannot serve.

    Raises:
      InputError: what, why and the cure in one line.
    """

  def frequencies(self, theta: float, size: int, length: int) -> jax.Array:
    """Returns float32 (H/2,) radians a position of each pair of H channels."""
    turns_P = theta ** (-np.arange(size // 2) / (size // 2))
    return jnp.asarray(self.stretch(turns_P, theta, length), jnp.float32)

  def stretch(self, turns_P: np.ndarray, theta: float, length: int) -> np.ndarray:
    """Returns the frequencies in place of theta^(-2i/H), all float64."""
    raise NotImplementedError

  def gain(self, length: int) -> float:
    """Returns what lengths of queries and keys are multiplied by."""
    del length
    return 1.0

  def least_alike(self, length: int) -> int:
    """Returns the fewest tokens of rows that turn just as rows of `length` do."""
    del length
    return 1

  @property
  def softmax_gain(self) -> float:
    """What attention that turns only a part of its channels multiplies its scores by."""
    return 1.0


@dataclasses.dataclass(frozen=True)
class PlainRope(RopeScaling):
  """Frequencies as they are."""

  def frequencies(self, theta: float, size: int, length: int) -> jax.Array:
    """Returns float32 (H/2,)."""
    del length
    return rope.frequencies(theta, size)


@dataclasses.dataclass(frozen=True)
class LinearRope(RopeScaling):
  """Every position counts 1 / factor (position interpolation, Chen et al. 2023)."""

  factor: float = 4.0

  def stretch(self, turns_P: np.ndarray, theta: float, length: int) -> np.ndarray:
    """Returns (H/2,)."""
    del theta, length
    return turns_P / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicRope(RopeScaling):
  """A larger base in rows longer than the model was trained with (dynamic NTK).

  Attributes:
    factor: How strongly the base grows with the length.
    original: The longest text of training, in tokens.
  """

  factor: float = 2.0
  original: int = 4096

  def check(self, size: int) -> None:
    """Refuses a single pair, for which the base has no exponent."""
    if size < 4:
      raise InputError(f"a dynamic base needs two pairs of channels or more: {size} channels turn")

  def stretch(self, turns_P: np.ndarray, theta: float, length: int) -> np.ndarray:
    """Returns (H/2,)."""
    pairs = len(turns_P)
    longer = max(length, self.original) / self.original
    grown = self.factor * longer - (self.factor - 1)
    base = theta * grown ** (pairs / (pairs - 1))
    return base ** (-np.arange(pairs) / pairs)

  def least_alike(self, length: int) -> int:
    """Returns 1, or the length where rows of it are longer than the model was trained with."""
    return length if length > self.original else 1


@dataclasses.dataclass(frozen=True)
class Llama3Rope(RopeScaling):
  """Slow pairs are slowed down, fast ones are not, and those between by degrees (Llama 3.1).

  Attributes:
    factor: How much slow pairs are slowed down.
    low: Pairs of fewer full turns than this over `original` are slow.
    high: Those of more than this are fast.
    original: The longest text of the first training, in tokens.
  """

  factor: float = 8.0
  low: float = 1.0
  high: float = 4.0
  original: int = 8192

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.high <= self.low:
      raise InputError(f"high must be above low: high={self.high}, low={self.low}")

  def stretch(self, turns_P: np.ndarray, theta: float, length: int) -> np.ndarray:
    """Returns (H/2,)."""
    del theta, length
    full_P = self.original * turns_P / (2 * math.pi)
    share_P = np.clip((full_P - self.low) / (self.high - self.low), 0, 1)
    return turns_P * (share_P + (1 - share_P) / self.factor)


@dataclasses.dataclass(frozen=True)
class Yarn(RopeScaling):
  """YaRN (Peng et al. 2023, arXiv:2309.00071, section 3), as transformers computes it.

  Attributes:
    factor: How much slow pairs are slowed down.
    original: The longest text of the first training, in tokens.
    fast: Pairs of more full turns than this over `original` stay as they are.
    slow: Pairs of fewer are slowed down all the way.
    attention_factor: The gain; None for what the other fields make of it.
    mscale: With `mscale_all`, the gain is m(mscale) / m(mscale_all) for m(x) = 0.1 x log(factor)
      + 1, and m(1) without (ibid., equation 22).
    mscale_all: Latent attention multiplies its scores by m(mscale_all)^2 (DeepSeek).
    truncate: Whether the pairs between which frequencies change by degrees are whole numbers
      (gpt-oss: not).
  """

  factor: float = 4.0
  original: int = 4096
  fast: float = 32.0
  slow: float = 1.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all: float | None = None
  truncate: bool = True

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.fast <= self.slow:
      raise InputError(f"fast must be above slow: fast={self.fast}, slow={self.slow}")

  def stretch(self, turns_P: np.ndarray, theta: float, length: int) -> np.ndarray:
    """Returns (H/2,)."""
    del length
    pairs = len(turns_P)
    first, last = (
      pairs * math.log(self.original / (turns * 2 * math.pi)) / math.log(theta)
      for turns in (self.fast, self.slow)
    )
    if self.truncate:
      first, last = math.floor(first), math.ceil(last)
    # The end is cut off by the channels, not by the pairs, in every public implementation.
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    last = last + 0.001 if first == last else last
    slowed_P = np.clip((np.arange(pairs) - first) / (last - first), 0, 1)
    return turns_P * (1 - slowed_P + slowed_P / self.factor)

  def gain(self, length: int) -> float:
    """Returns the attention factor."""
    del length
    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale is not None and self.mscale_all is not None:
      return self._magnitude(self.mscale) / self._magnitude(self.mscale_all)
    return self._magnitude(1.0)

  @property
  def softmax_gain(self) -> float:
    """The square of what `mscale_all` makes of the factor."""
    return 1.0 if self.mscale_all is None else self._magnitude(self.mscale_all) ** 2

  def _magnitude(self, mscale: float) -> float:
    return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1


@dataclasses.dataclass(frozen=True)
class LongRope(RopeScaling):
  """Frequencies over factors that were searched for (Ding et al. 2024, arXiv:2402.13753).

  Attributes:
    short: What the frequency of each pair is divided by in rows of at most `original` tokens.
    long: And in longer ones.
    original: The longest text of the first training, in tokens.
    factor: The longest text over `original`; a gain that is not given is
      sqrt(1 + log(factor) / log(original)).
    short_gain: The gain in short rows (Phi-3.5-MoE's short_mscale); None for that.
    long_gain: The gain in long rows (long_mscale); None for that.
  """

  short: tuple[float, ...]
  long: tuple[float, ...]
  original: int = 4096
  factor: float = 32.0
  short_gain: float | None = None
  long_gain: float | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    if min((*self.short, *self.long, 1.0)) <= 0 or self.original < 2:
      raise InputError(
        "factors must be above 0 and original at least 2: "
        f"short={self.short}, long={self.long}, original={self.original}"
      )

  def check(self, size: int) -> None:
    """Refuses lists of factors that are not of a length with the pairs."""
    if {len(self.short), len(self.long)} != {size // 2}:
      raise InputError(
        f"short and long must have a factor for each of the {size // 2} pairs of {size} channels "
        f"that turn: they have {len(self.short)} and {len(self.long)}"
      )

  def stretch(self, turns_P: np.ndarray, theta: float, length: int) -> np.ndarray:
    """Returns (H/2,)."""
    del theta
    return turns_P / np.array(self.long if length > self.original else self.short)

  def gain(self, length: int) -> float:
    """Returns the gain of rows so long."""
    given = self.long_gain if length > self.original else self.short_gain
    if given is not None:
      return given
    return math.sqrt(1 + math.log(max(self.factor, 1.0)) / math.log(self.original))

  def least_alike(self, length: int) -> int:
    """Returns 1 for short rows, the shortest of the long ones for long rows."""
    return self.original + 1 if length > self.original else 1


ROPES = {
  "plain": (PlainRope, PlainRope()),
  "linear": (LinearRope, LinearRope()),
  "dynamic": (DynamicRope, DynamicRope(original=8)),
  "llama3": (Llama3Rope, Llama3Rope(original=64)),
  "yarn": (Yarn, Yarn(original=64)),
  "longrope": (
    LongRope,
    LongRope((1.0, 1.1, 1.5, 2.0), (1.0, 2.0, 6.0, 20.0), original=8, factor=4.0),
  ),
}
