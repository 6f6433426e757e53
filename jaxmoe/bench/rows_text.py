"""Rows of a suite as a table for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from jaxmoe.bench.results import Row

VISITED = ("blocks", "x mean", "pairs x mean", "MB a hop", "MB sent")
"""Of rows over context devices: blocks of the busiest, its pairs over the ring's steps, bytes."""
UNTIMED = ("missing", "unfit", "wrong", "failed")
"""What a row says instead of a time: not installed, not for these devices, not right, or ended."""


def rows_text(title: str, rows: Sequence[Row]) -> Table:
  """Returns the table of a race: seconds of the processor and ratios, or what is counted."""
  if any("traces" in row for row in rows):
    return _events(title, rows)
  if any("hop_bytes" in row for row in rows):
    return _strategies(title, rows)
  timed = any("cpu_seconds" in row for row in rows)
  for row in rows:
    if "fits" in row:
      powers = [f"{cost} ^{one['exponent']:.2f}" for cost, one in row["fits"].items()]
      title = f"{title}: {', '.join(powers)}"
  table = Table(title=title, title_justify="left", min_width=78)
  table.add_column("")
  headings = ["MFLOP", "x least", "MB", "x least", "temp MB", "fusions"]
  if timed:
    mfu = ["MFU %"] if any("cpu_mfu" in row for row in rows) else []
    headings = ["processor ms", "clock ms", "x", *mfu]
  for heading in headings:
    table.add_column(heading, justify="right")
  for row in (row for row in rows if "fits" not in row):
    cells = _untimed(row) or (_timed(row) if timed else counted(row))
    table.add_row(row["name"], *cells[: len(headings)])
  return table


def _strategies(title: str, rows: Sequence[Row]) -> Table:
  """Returns the table of rows over context devices: what the busiest visits, and what it sends."""
  table = Table("", title=title, title_justify="left", min_width=78)
  for heading in VISITED:
    table.add_column(heading, justify="right")
  for row in rows:
    table.add_row(row["name"], *visited(row))
  return table


def visited(row: Row) -> list[str]:
  """Returns what a row over context devices has under the headings of VISITED."""
  blocks, sent = row["blocks"], (row["hop_bytes"] / 1e6, row["sent_bytes"] / 1e6)
  return list(map(short, (blocks, blocks / row["mean_blocks"], row["busiest_pairs"], *sent)))


def _events(title: str, rows: Sequence[Row]) -> Table:
  """Returns the table of what starts made JAX do."""
  table = Table("", title=title, title_justify="left", min_width=78)
  for heading in ("traces", "programs", "compiled", "fetched"):
    table.add_column(heading, justify="right")
  for row in rows:
    names = ("traces", "programs", "compiled", "fetched")
    table.add_row(row["name"], *(str(row[name]) for name in names))
  return table


def of_least(row: Row, what: str) -> float | None:
  """Returns how many times the least a program does, of `flops` or `bytes`; None for no least."""
  least = row.get(f"ideal_{what}")
  return row[what] / least if least else None


def at_least(row: Row, what: str) -> bool:
  """Whether more than is counted may be done: loops of unknown length have one pass counted.

  Of the loop that writes tokens one pass is meant.
  """
  return row.get(f"unknown_{what}", 0) > 0 and not row.get("one_pass")


def counted(row: Row) -> list[str]:
  """Returns MFLOP and MB, each with how many times the least it is, temporary MB and fusions."""
  found = []
  for what in ("flops", "bytes"):
    mark = "≥" if at_least(row, what) else ""
    both = short(row[what] / 1e6), short(of_least(row, what))
    found += [f"{mark}{number}" if number else "" for number in both]
  return [*found, short(row["temp_bytes"] / 1e6), str(row["fusions"])]


def short(number: float | None) -> str:
  """Returns a number with about three digits; '' for none."""
  if number is None:
    return ""
  places = 2 if number < 10 else 1 if number < 100 else 0
  return f"{round(number, places) + 0.0:.{places}f}"  # no -0.00


def _untimed(row: Row) -> list[str]:
  """Returns why a contestant has no numbers; nothing where it has some."""
  return next(([f"{kind}: {row[kind]}"] for kind in UNTIMED if kind in row), [])


def _timed(row: Row) -> list[str]:
  low, high = (short(1e3 * value) for value in row["cpu_quartiles"])
  mfu = 100 * row["cpu_mfu"] if "cpu_mfu" in row else None
  cpu = f"{short(1e3 * row['cpu_seconds'])} ({low}-{high})"
  return [cpu, short(1e3 * row["seconds"]), short(row["ratio"]), short(mfu)]
