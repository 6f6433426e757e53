"""Parts of tensors that devices wrote, put together by rules over names.

After Universal Checkpointing (Lian et al. 2024, arXiv:2406.18820): a pattern says of a parameter
how its parts make the whole, and one tensor is in memory at a time. Here devices are a grid of
named axes, which are joined one after another, the last axis first, each by rules of its own:
experts over one axis and columns over another are two rules. A rule of a parameter is that of its
moments.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, get_args

import numpy as np

from jaxmoe.core.errors import InputError

Kind = Literal["unique", "replicate", "fragment", "average"]
Shape = tuple[int, ...]
_MOMENT = re.compile(r"(.+?)\.(?:exp_avg|exp_avg_sq)")


@dataclasses.dataclass(frozen=True)
class Rule:
  """How parts along one axis make the whole of what a pattern names.

  Attributes:
    pattern: A regular expression that all of a name matches.
    kind: `unique`: one device has it; `replicate`: all have the same bits; `fragment`: cut along
      `dim`; `average`: the mean is meant.
    dim: That is cut, or that has padding.
    sub_widths: The widths in the whole of what lies fused along `dim`, each of which is cut by
      itself, such as q, k and v; first devices have one more where that is not even. () for one.
    pad: The width of `dim` in the whole; what lies behind is padding. None for none.
  """

  pattern: str
  kind: Kind
  dim: int = 0
  sub_widths: tuple[int, ...] = ()
  pad: int | None = None

  def __post_init__(self) -> None:
    if self.kind not in get_args(Kind):
      known = ", ".join(get_args(Kind))
      raise InputError(f"rule {self.pattern!r}: kind={self.kind!r} is not known, only {known}")
    try:
      re.compile(self.pattern)
    except re.error as error:
      raise InputError(f"rule {self.pattern!r}: no regular expression ({error})") from None
    if self.dim < 0 or min(self.sub_widths, default=1) < 1 or self.pad == 0:
      raise InputError(f"rule {self.pattern!r}: dim counts from 0, widths and pad from 1")
    if self.sub_widths and self.kind != "fragment":
      raise InputError(f"rule {self.pattern!r}: sub_widths are of a fragment")

  def shape(self, name: str, parts: Sequence[Shape]) -> Shape:
    """Returns the shape of the whole.

    Raises:
      InputError: parts do not fit each other or the rule.
    """
    first = parts[0]
    if (self.kind == "fragment" or self.pad) and self.dim >= len(first):
      raise InputError(f"{name}: rule {self.pattern!r} has dim={self.dim}, and parts are {first}")
    others = [self._without(part) for part in parts]
    if len({*others}) != 1 or (self.kind != "fragment" and len({*parts}) != 1):
      raise InputError(f"{name}: parts of {sorted({*parts})} do not fit rule {self.pattern!r}")
    whole = list(first)
    if self.kind == "fragment":
      for at, part in enumerate(parts):
        due = sum(self._widths(at, len(parts)))
        if self.sub_widths and part[self.dim] != due:
          raise InputError(
            f"{name}: part {at} is {part[self.dim]} wide in dim {self.dim}, and sub_widths of "
            f"rule {self.pattern!r} make {due}"
          )
      whole[self.dim] = sum(part[self.dim] for part in parts)
    if self.pad is not None:
      if self.pad > whole[self.dim]:
        raise InputError(f"{name}: {whole[self.dim]} wide, less than pad of rule {self.pattern!r}")
      whole[self.dim] = self.pad
    return tuple(whole)

  def join(self, name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the whole of parts in order of device.

    Raises:
      InputError: as `shape`, or copies differ.
    """
    shape = self.shape(name, [part.shape for part in parts])
    whole = parts[0]
    if self.kind == "replicate":
      for at, part in enumerate(parts):
        if part.tobytes() != whole.tobytes():
          raise InputError(f"{name}: copies 0 and {at} differ, and rule {self.pattern!r} has one")
    elif self.kind == "average":
      whole = np.mean([part.astype(np.float64) for part in parts], 0).astype(whole.dtype)
    elif self.kind == "fragment":
      whole = self._laid(parts)
    return whole[tuple(map(slice, shape))]

  def _laid(self, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns parts one after another, those of each fused part together."""
    number = len(parts)
    if not self.sub_widths:
      return np.concatenate(parts, self.dim)
    split = [
      np.split(part, np.cumsum(self._widths(at, number))[:-1], self.dim)
      for at, part in enumerate(parts)
    ]
    return np.concatenate([piece for fused in zip(*split) for piece in fused], self.dim)

  def _widths(self, at: int, number: int) -> list[int]:
    """Returns how wide each fused part is on one of so many devices."""
    return [width // number + (at < width % number) for width in self.sub_widths]

  def _without(self, shape: Shape) -> Shape:
    """Returns a shape without the dim that is cut."""
    return shape[: self.dim] + shape[self.dim + 1 :] if self.kind == "fragment" else shape


class Shard(Protocol):
  """What one device wrote."""

  def shapes(self) -> Mapping[str, Shape]:
    """Returns the shape of each tensor by name."""

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor."""


class Union:
  """Tensors of which devices of a grid wrote parts.

  Attributes:
    shapes: Of the wholes by name.

  Args:
    axes: Sizes of the grid's axes by name; the last changes fastest from device to device.
    rules: Of each axis.
    shards: What each device wrote, in order.

  Raises:
    InputError: a device is missing; a name has no rule or two, a rule no name; or parts do not fit.
  """

  def __init__(
    self, axes: Mapping[str, int], rules: Mapping[str, Sequence[Rule]], shards: Sequence[Shard]
  ):
    if len(shards) != math.prod(axes.values()):
      raise InputError(f"{len(shards)} devices wrote parts, and axes are {dict(axes)}; give all")
    if rules.keys() != axes.keys():
      raise InputError(f"rules are of {sorted(rules)}, and axes {sorted(axes)}; give both alike")
    self._shards, self._sizes = shards, list(axes.values())
    self._there = [shard.shapes() for shard in shards]
    names = sorted(set().union(*self._there))
    chosen = [_chosen(axis, rules[axis], names) for axis in axes]
    self._rules = {name: [of[name] for of in chosen] for name in names}
    self.shapes = {name: self._shape(name, 0, 0) for name in names}

  def read(self, name: str) -> np.ndarray:
    """Returns a whole; its parts alone are in memory with it.

    Raises:
      InputError: copies differ.
    """
    return self._read(name, 0, 0)

  def _shape(self, name: str, depth: int, first: int) -> Shape:
    if depth == len(self._sizes):
      return self._there[first][name]
    below = self._below(name, depth, first)
    return self._rules[name][depth].shape(
      name, [self._shape(name, depth + 1, device) for device in below]
    )

  def _read(self, name: str, depth: int, first: int) -> np.ndarray:
    if depth == len(self._sizes):
      return self._shards[first].read(name)
    below = self._below(name, depth, first)
    return self._rules[name][depth].join(
      name, [self._read(name, depth + 1, device) for device in below]
    )

  def _below(self, name: str, depth: int, first: int) -> list[int]:
    """Returns the first devices of what is joined here: those that have the name."""
    rule, stride = self._rules[name][depth], math.prod(self._sizes[depth + 1 :])
    all_of = [first + at * stride for at in range(self._sizes[depth])]
    having = [at for at in all_of if any(name in of for of in self._there[at : at + stride])]
    if rule.kind == "unique" and len(having) != 1:
      raise InputError(f"{name}: on {len(having)} devices, and rule {rule.pattern!r} is unique")
    if rule.kind != "unique" and having != all_of:
      missing = sorted(set(all_of) - set(having))
      raise InputError(f"{name}: device {missing[0]} has no part for rule {rule.pattern!r}")
    return having


def _chosen(axis: str, rules: Sequence[Rule], names: Sequence[str]) -> dict[str, Rule]:
  """Returns the one rule of each name along an axis."""
  chosen, used = {}, set()
  for name in names:
    moment = _MOMENT.fullmatch(name)
    parameter = moment[1] if moment else name
    found = [rule for rule in rules if re.fullmatch(rule.pattern, parameter)]
    if len(found) != 1:
      which = " and ".join(repr(rule.pattern) for rule in found) or "no rule"
      raise InputError(f"{name}: {which} along {axis}; a name has one")
    chosen[name] = found[0]
    used.add(found[0])
  for rule in rules:
    if rule not in used:
      raise InputError(f"rule {rule.pattern!r} along {axis} names no tensor")
  return chosen
