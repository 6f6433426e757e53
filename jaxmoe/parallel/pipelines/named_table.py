"""The table that a recipe asks for: a name of PIPELINES, or a CSV file."""

from __future__ import annotations

from collections.abc import Callable

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines.csv_notation import read_table
from jaxmoe.parallel.pipelines.table import Table, Vocabulary


def named_table(
  pipeline: str,
  num_devices: int,
  num_micro: int,
  pipelines: dict[str, Callable[[int, int], Table]],
  vocabulary: Vocabulary | None = None,
) -> Table:
  """Returns the table of a pipeline by name, or of a file that ends in .csv.

  Raises:
    InputError: There is no such pipeline, too few microbatches for it, or a file is no table or one
      of other degrees; one line that says what works.
  """
  if pipeline.endswith(".csv"):
    table = read_table(pipeline, vocabulary)
    found = (table.placement.num_devices, table.num_micro)
    if found != (num_devices, num_micro):
      raise InputError(
        f"{pipeline} is of {found[0]} devices and {found[1]} microbatches, the recipe of "
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
