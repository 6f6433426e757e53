"""The stages and the table of a recipe's pipeline, and what is refused of them."""

from __future__ import annotations

from collections.abc import Callable

from jaxmoe.core.errors import InputError
from jaxmoe.core.param_names import LayerGroupSizes
from jaxmoe.models.stack import layer_group_sizes
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.parallel import Parallel
from jaxmoe.parallel.pipelines import PIPELINES, Table, named_table
from jaxmoe.parallel.pipelines.csv_notation import read_table
from jaxmoe.parallel.stages import Stages, check_counts, cut_by_cost

OFFERED = frozenset(("F", "B", "W", "BW"))
"""The passes that tables may have; side by side, too."""


def table_of(parallel: Parallel, num_micro: int) -> Table:
  """Returns the table of the degrees' pipeline.

  Raises:
    InputError: there is no such pipeline, or there are too few microbatches for it.
  """
  pipelines: dict[str, Callable[[int, int], Table]] = {**PIPELINES}
  table = named_table(parallel.pipeline, parallel.pipe, num_micro, pipelines)
  if num_micro < parallel.pipe:
    raise InputError(
      f"a pipeline of {parallel.pipe} devices needs as many microbatches or more, for with fewer "
      f"some always idle: train.num_micro={num_micro}; set train.num_micro={parallel.pipe} or more"
    )
  kinds = {part.kind for order in table.orders for action in order for part in action.parts}
  if kinds - OFFERED:
    raise InputError(
      f"{parallel.pipeline} has passes {', '.join(sorted(kinds - OFFERED))}, which are not offered "
      f"yet; those that are: {', '.join(sorted(OFFERED))}"
    )
  return table


def stages_of(parallel: Parallel, model: TransformerConfig, vocab_size: int) -> Stages:
  """Returns the stages of a model: those that are asked for, or cut by the FLOPs of products.

  Raises:
    InputError: there are fewer layers than stages, or not those that are asked for.
  """
  if parallel.pipeline.endswith(".csv"):
    placement = read_table(parallel.pipeline).placement
  else:
    placement = table_of(parallel, 2 * parallel.pipe).placement
  stages, layers = placement.num_stages, model.num_layers
  if layers < stages:
    raise InputError(
      f"pipeline {parallel.pipeline} of {parallel.pipe} devices has {stages} stages of at least "
      f"one layer, and the model has {layers}; set parallel.pipe lower, or take another pipeline"
    )
  if parallel.stages:
    check_counts(parallel.stages, layers, stages)
    return Stages(parallel.stages, placement.device_of)
  costs = [
    float(block.active_params(model.dim))
    for group in model.stack for _ in range(group.repeats) for block in group.pattern
  ]  # fmt: skip
  costs[-1] += model.dim * vocab_size  # the head's, which lies on the last stage
  return Stages(cut_by_cost(costs, stages), placement.device_of)


def placed_groups(
  parallel: Parallel, model: TransformerConfig, vocab_size: int
) -> LayerGroupSizes | None:
  """Returns how a model's layers are grouped in memory over stages; None without a pipeline."""
  if parallel.pipe == 1:
    return None
  return stages_of(parallel, model, vocab_size).placed(layer_group_sizes(model.stack))
