"""Numbers as people write them: short, with units."""

from __future__ import annotations

import math
from typing import Any

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def finite(value: Any) -> float:
  """Returns a number of a file as a float, NaN for anything that is not a finite number."""
  if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e100:
    return math.nan
  return float(value)


def counted(value: float, digits: int = 3) -> str:
  """Returns a count with the unit of its size: 428000 is '428k'."""
  for size, unit in UNITS:
    if abs(value) >= size * (1 - 0.5 * 10**-digits):
      return short(value / size, digits) + unit
  return short(value, digits)


def short(value: float, digits: int = 4) -> str:
  """Returns a number with so many digits that matter, without zeros at the end."""
  if not math.isfinite(value):
    return "-"
  if value and not 1e-3 <= abs(value) < 1e6:
    return scientific(value, digits)
  places = max(digits - 1 - math.floor(math.log10(abs(value))), 0) if value else 0
  text = f"{value:.{places}f}"
  return text.rstrip("0").rstrip(".") if "." in text else text


def scientific(value: float, digits: int = 4) -> str:
  """Returns a number with a power of ten: 0.0005 is '5e-4'."""
  mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
  mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
  return f"{mantissa}e{int(exponent)}" if value else "0"


def percent(share: float) -> str:
  """Returns a share as a percentage; what is there but tiny is not called 0."""
  if not math.isfinite(share):
    return "-"
  if 0 < abs(share) < 0.001:
    return "<0.1%"
  return f"{100 * share:.1f}%"


def seconds(value: float) -> str:
  """Returns a length of time in the two units that matter."""
  if not math.isfinite(value):
    return "-"
  if abs(value) < 60:
    return f"{value:.1f} s" if abs(value) >= 0.1 or not value else f"{1000 * value:.2g} ms"
  whole = round(abs(value))
  sizes = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
  first = next(i for i, (size, _) in enumerate(sizes) if whole >= size)
  parts = []
  for size, unit in sizes[first : first + 2]:
    parts.append(f"{whole // size} {unit}")
    whole %= size
  return ("-" if value < 0 else "") + " ".join(parts)


def plain(value: float, digits: int = 6) -> float | None:
  """Returns a number for JSON: rounded to the digits that matter, None if it is not finite."""
  return float(f"{value:.{digits}g}") if math.isfinite(value) else None
