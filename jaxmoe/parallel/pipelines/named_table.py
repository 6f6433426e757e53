"""The table that a recipe asks for: a name of PIPELINES, a CSV file, or the text of one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines.csv_notation import parse_table, read_table
from jaxmoe.parallel.pipelines.table import Table, Vocabulary


def own_table(pipeline: str, vocabulary: Vocabulary | None = None) -> Table | None:
  """Returns the table of a CSV file, or of the text of one; None of a name.

  Raises:
    InputError: As `read_table`.
  """
  if pipeline.endswith(".csv"):
    return read_table(pipeline, vocabulary)
  return parse_table(pipeline, shown(pipeline), vocabulary) if "\n" in pipeline else None


def shown(pipeline: str) -> str:
  """Returns what a pipeline is called: a text by its digest."""
  if "\n" not in pipeline:
    return pipeline
  return f"table_{hashlib.sha256(pipeline.encode()).hexdigest()[:8]}"


def named_table(
  pipeline: str,
  num_devices: int,
  num_micro: int,
  pipelines: dict[str, Callable[[int, int], Table]],
  vocabulary: Vocabulary | None = None,
) -> Table:
  """Returns the table of a pipeline by name, of a file that ends in .csv, or of the text of one.

  Raises:
    InputError: There is no such pipeline, too few microbatches for it, or a file is no table or one
      of other degrees; one line that says what works.
  """
  if (table := own_table(pipeline, vocabulary)) is not None:
    found = (table.placement.num_devices, table.num_micro)
    if found != (num_devices, num_micro):
      raise InputError(
        f"{shown(pipeline)} is of {found[0]} devices and {found[1]} microbatches, the recipe of "
        f"{num_devices} and {num_micro}; set parallel.pipe={found[0]} and "
        f"train.num_micro={found[1]}, or give another file"
      )
    return table
  if pipeline not in pipelines:
    raise InputError(
      f"parallel.pipeline must be one of {', '.join(pipelines)} or a file that ends in .csv: "
      f"parallel.pipeline={pipeline}"
    )
  return pipelines[pipeline](num_devices, num_micro)
