"""Checks of numbers that several optimizers share."""

from jaxmoe.core.errors import InputError


def check_rates(**rates: float) -> None:
  """Raises InputError unless every averaging rate is at least 0 and below 1."""
  for name, rate in rates.items():
    if not 0 <= rate < 1:
      raise InputError(f"an averaging rate lies in [0, 1): {name}={rate}; try 0.9")


def check_positive(**values: float) -> None:
  """Raises InputError unless every value is above 0."""
  for name, value in values.items():
    if not value > 0:
      raise InputError(f"{name} must be above 0: {name}={value}; raise it")


def check_decay(weight_decay: float) -> None:
  """Raises InputError for a negative weight decay."""
  if not weight_decay >= 0:
    raise InputError(f"weights would grow: {weight_decay=}; set it to 0 or more")
