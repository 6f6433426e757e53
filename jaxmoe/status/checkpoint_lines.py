"""Lines that say what lies in the folder of a run's checkpoints, and how two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxmoe.checkpoint.step_difference import ArrayDifference
from jaxmoe.checkpoint.step_listing import WHOLE, ListedStep
from jaxmoe.status.text_columns import ago, fit, labelled

_MIB = 2**20


def step_lines(steps: Sequence[ListedStep], now_unix_s: float) -> Iterator[str]:
  """Yields a line a step, and below it why it does not count; at most 80 cells wide."""
  yield f"{'step':>9}  {'arrays':>6}  {'values':>12}  {'on disk':>12}  {'written':>11}  state"
  for one in steps:
    arrays = "?" if one.num_arrays is None else f"{one.num_arrays:,}"
    values = "?" if one.num_bytes is None else _mib(one.num_bytes)
    written = f"{ago(now_unix_s - one.written_unix_s)} ago"
    state = "unreadable" if one.state == WHOLE and one.why else one.state
    yield fit(
      f"{one.step:>9}  {arrays:>6}  {values:>12}  {_mib(one.bytes_on_disk):>12}  {written:>11}  "
      f"{state}"
    )
    if one.why:
      yield from labelled("", one.why.split(), gap=" ")


def difference_line(found: ArrayDifference) -> str:
  """Returns what an array differs in; not cut, names are for other programs too."""
  if found.what:
    return f"{found.name}: {found.what}"
  return (
    f"{found.name}: {found.num_values:,} values differ, by {found.largest:.3g} at most "
    f"(relative norm {found.relative:.3g})"
  )


def _mib(num_bytes: int) -> str:
  return f"{num_bytes / _MIB:,.1f} MiB"
