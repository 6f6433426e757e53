"""One choice of back ends: which of several equal functions computes an operation, and for what.

An operation is a package with a visible dict `BACKENDS = {name: Backend(call, fits)}`, the best
first. Whoever calls it says what it needs; a `Chooser` takes the one that its names ask for, or
under `auto` the fastest of a race on such devices (`core/measured.py`), or where there was none the
first that fits, and tells a `ChoiceLog`. The devices of a need are those that the
program is for, which may not be there; inside `shard_map` sizes are those of one device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.core.measured import Measured, known, source_digest

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Devices:
  """The devices that a program is for.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    kind: Such as 'NVIDIA H200' or 'TPU v5 lite', as JAX has it.
  """

  platform: str
  kind: str = ""

  @classmethod
  def of(cls, devices: Iterable[Any]) -> Devices:
    """Returns what devices of a mesh or of a topology are, all of which are alike."""
    first = next(iter(devices))
    return cls(first.platform, first.device_kind)

  @classmethod
  def here(cls) -> Devices:
    """Returns what programs of this process run on where nothing else is said; starts JAX."""
    return cls.of(jax.local_devices())


@dataclasses.dataclass(frozen=True)
class Need:
  """What one call of an operation needs of a back end.

  Attributes:
    devices: Those that the program is for.
    dtype: Of the rows.
    sizes: By letter, those that every name of an array ends in: T tokens, E experts, ...
    features: What not every back end can, by the words of the operation's package.
  """

  devices: Devices
  dtype: str = "float32"
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  features: frozenset[str] = frozenset()


Fits = Callable[[Need], str | None]
"""Why a back end cannot serve a need, or is not meant to; None where it is."""


def anywhere(need: Need) -> str | None:
  """Fits every need."""
  del need
  return None


def unmeasured(need: Need) -> str | None:
  """Meant for no need by itself: a kernel is taken where it won a race, or asked for by name."""
  del need
  return "has not been measured on such a device; jaxmoe bench kernels does, or ask for it by name"


def limited(
  platforms: Iterable[str] | None = None,
  features: Iterable[str] | None = None,
  dtypes: Iterable[str] | None = None,
) -> Fits:
  """Returns what fits just these platforms, features and dtypes; None is any."""

  def fits(need: Need) -> str | None:
    known = None if features is None else frozenset(features)
    if platforms is not None and need.devices.platform not in platforms:
      return f"is for {' and '.join(platforms)}, the devices are {need.devices.platform}"
    if known is not None and need.features - known:
      return f"has no {', '.join(sorted(need.features - known))}"
    if dtypes is not None and need.dtype not in dtypes:
      return f"takes {' and '.join(dtypes)}, not {need.dtype}"
    return None

  return fits


@dataclasses.dataclass(frozen=True)
class Backend:
  """One way to compute an operation; called like the others of its dict.

  Attributes:
    call: The function.
    fits: Which needs it serves.
    auto: For which of them `auto` takes it; one that is asked for is taken for any that it serves.
  """

  call: Callable[..., Any]
  fits: Fits = anywhere
  auto: Fits = anywhere

  def __call__(self, *args: Any, **keywords: Any) -> Any:
    """Returns what the function does."""
    return self.call(*args, **keywords)


Backends = Mapping[str, Backend]


@dataclasses.dataclass(frozen=True)
class Choice:
  """That an operation is computed by a back end, and why.

  Attributes:
    operation: Its package.
    backend: The name.
    why: In a few words.
    raced: Whether it won a race on such devices.
  """

  operation: str
  backend: str
  why: str
  raced: bool = False

  def __str__(self) -> str:
    return f"{self.operation}: {self.backend} ({self.why})"


class ChoiceLog:
  """What was chosen while programs were traced, in order, each once."""

  def __init__(self) -> None:
    self._choices: dict[Choice, None] = {}

  def add(self, choice: Choice) -> None:
    """Keeps a choice."""
    self._choices[choice] = None

  def take(self) -> tuple[Choice, ...]:
    """Returns what was chosen since the last call."""
    choices, self._choices = tuple(self._choices), {}
    return choices


@dataclasses.dataclass(frozen=True)
class Chooser:
  """Chooses back ends for the programs of a model.

  Attributes:
    devices: Those that programs are for; None for those of this process.
    names: Pairs of an operation and the back end asked for; others are `auto`.
    strict: Whether one that was asked for and does not fit is an error; else the choice is that of
      `auto`, and says so, as where a run is opened on another machine than it trained on.
    log: Where choices are told, if anywhere.
  """

  devices: Devices | None = None
  names: tuple[tuple[str, str], ...] = ()
  strict: bool = True
  log: ChoiceLog | None = dataclasses.field(default=None, compare=False)

  def of_devices(self, devices: Iterable[Any]) -> Chooser:
    """Returns the same for these devices, where it does not know its own yet."""
    return self if self.devices else dataclasses.replace(self, devices=Devices.of(devices))

  def choose(
    self,
    operation: str,
    backends: Backends,
    dtype: Any,
    sizes: Mapping[str, int],
    features: Iterable[str] = (),
  ) -> Backend:
    """Returns the back end for a call, at the time it is traced.

    Args:
      operation: The name of its package.
      backends: Its `BACKENDS`.
      dtype: Of the rows.
      sizes: By letter.
      features: What the call uses of what not all of them can.

    Raises:
      InputError: none has that name, the one asked for does not fit, or none does.
    """
    devices = self.devices or Devices.here()
    need = Need(devices, jnp.dtype(dtype).name, sizes, frozenset(features))
    choice = self._choice(operation, backends, need)
    if self.log is not None:
      self.log.add(choice)
    return backends[choice.backend]

  def _choice(self, operation: str, backends: Backends, need: Need) -> Choice:
    asked = dict(self.names).get(operation, AUTO)
    if asked != AUTO and asked not in backends:
      known = ", ".join((AUTO, *backends))
      raise InputError(f"kernels.{operation}={asked}: there is no such back end; known: {known}")
    reasons = {name: backend.fits(need) for name, backend in backends.items()}
    fitting = [name for name, reason in reasons.items() if reason is None]
    if asked in fitting:
      return Choice(operation, asked, "asked for")
    if asked != AUTO and self.strict:
      others = ", ".join((AUTO, *fitting) if fitting else ["none"])
      raise InputError(f"kernels.{operation}={asked} {reasons[asked]}; what fits: {others}")
    if not fitting:
      why = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
      raise InputError(f"kernels.{operation}: no back end fits: {why}; change what they ask for")
    if asked == AUTO and (raced := _fastest(operation, backends, need, fitting)):
      return raced
    passed = {name: reason or backends[name].auto(need) for name, reason in reasons.items()}
    taken = next((name for name, reason in passed.items() if reason is None), fitting[0])
    before = list(reasons)[: list(reasons).index(taken)]
    why = "; ".join(f"{name} {passed[name]}" for name in before) or "the first that fits"
    if asked != AUTO:
      why = f"{asked} was asked for; it {reasons[asked]}"
    return Choice(operation, taken, why)


def _fastest(
  operation: str, backends: Backends, need: Need, fitting: list[str], rows: Measured | None = None
) -> Choice | None:
  """Returns the fastest of a race on such devices, among those that fit; None without a race."""
  devices = need.devices
  if devices.platform == "cpu":
    return None
  raced = (rows or known()).near(operation, devices.kind, need.dtype, need.sizes)
  row = next((row for row in raced if row.backend in fitting), None)
  if row is None:
    return None
  sizes = ", ".join(f"{letter} {size}" for letter, size in sorted(row.sizes.items()))
  why = f"the fastest of {len(raced)} measured on {row.kind} in {row.dtype} at {sizes}"
  if row.sources != source_digest(backends[row.backend].call):
    why += "; its sources have changed since"
  return Choice(operation, row.backend, why, raced=True)


HERE = Chooser()
"""Chooses for the devices of this process, and tells nobody."""
