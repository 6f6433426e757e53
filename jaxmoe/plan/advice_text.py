"""The summary of a pipeline and the advice for context devices as plain text of 80 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence

from jaxmoe.plan.context_summary import ContextSummary
from jaxmoe.plan.explain_text import WIDTH, size
from jaxmoe.plan.pipeline_summary import PipelineSummary, TableSummary


def pipeline_text(found: PipelineSummary | None) -> Iterator[str]:
  """Yields the lines of a pipeline, none without one."""
  if found is None:
    return
  own = found.own
  yield ""
  yield (
    f"pipeline {own.pipeline}: {found.devices} devices, {found.num_micro} microbatches, "
    f"{own.ticks} ticks"
  )
  yield from _wrapped("layers of each stage: " + ",".join(map(str, found.stages)))
  slots = ", ".join(f"{pool} {count}" for pool, count in own.slots.items() if count)
  yield from _wrapped(f"slots of a device: {slots or 'none'}")
  for keep, pools in found.slots.items():
    here = ", ".join(f"{pool} {size(count)}" for pool, count in pools.items() if count)
    mine = " (this recipe)" if keep == found.keep else ""
    yield from _wrapped(f"slots with keep={keep}{mine}: {here or 'none'}")
  flops = ", ".join(f"{kind} {value:.3g}" for kind, value in found.flops.items())
  yield from _wrapped(f"FLOPs of a mean stage and microbatch: {flops}")
  sent = ", ".join(f"{way} {size(count)}" for way, count in found.sent.items())
  yield from _wrapped(f"permutes of the stream in a step, a device: {sent}")
  if found.summed:
    summed = size(round(found.summed))
    yield from _wrapped(f"sums of the stream for the vocabulary, a device: {summed}")
  yield "  simulated, of equal stages   bubble   in ticks   step   in ticks   in flight"
  for table in (own, *found.rivals):
    yield _row(table)


def _row(table: TableSummary) -> str:
  """Returns a table's line; a step is told over one without bubble."""
  return (
    f"    {table.pipeline:<26}{table.bubble:>6.1%}{table.bubble_in_ticks:>11.1%}"
    f"{table.time:>7.2f}{table.time_in_ticks:>11.2f}{table.in_flight:>12.1f}"
  )


def context_text(found: Sequence[ContextSummary]) -> Iterator[str]:
  """Yields the lines of each kind of attention."""
  for each in found:
    yield ""
    yield (
      f"{each.layers} layers of {each.attention} over {each.context} context devices, one layer "
      "and row,"
    )
    yield (
      f"  forward and backward, mean of {each.rows} rows, predicted at {each.flops_per_s:.3g} "
      "FLOP/s"
    )
    yield "  attend        order         ms   waits for links   busiest over mean pairs"
    for time in each.times:
      if math.isinf(time.seconds):
        yield from _wrapped(f"{time.attend} is not to be had: {time.refused}")
      else:
        yield (
          f"  {time.attend:<14}{time.order:<10}{time.seconds * 1e3:>6.3g}"
          f"{time.waits_s / time.seconds:>18.0%}{time.imbalance:>26.2f}"
        )
    yield from _wrapped(each.choice)


def _wrapped(text: str) -> list[str]:
  """Returns text as indented lines."""
  return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
