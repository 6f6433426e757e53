"""The stages and the table of a recipe's pipeline, and what is refused of them."""

from __future__ import annotations

from collections.abc import Callable

from jaxmoe.core.errors import InputError
from jaxmoe.core.param_names import LayerGroupSizes
from jaxmoe.models.stack import layer_group_sizes
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.parallel import Parallel
from jaxmoe.parallel.pipelines import (
  PIPELINES,
  Table,
  Vocabulary,
  named_table,
  own_table,
  shown,
  with_vocabulary,
)
from jaxmoe.parallel.stages import Stages, check_counts, cut_by_cost


def table_of(parallel: Parallel, num_micro: int) -> Table:
  """Returns the table of the degrees' pipeline.

  Raises:
    InputError: there is no such pipeline, or there are too few microbatches for it.
  """
  pipelines: dict[str, Callable[[int, int], Table]] = {**PIPELINES}
  vocabulary = vocabulary_of(parallel)
  table = named_table(parallel.pipeline, parallel.pipe, num_micro, pipelines, vocabulary)
  if num_micro < parallel.pipe:
    raise InputError(
      f"a pipeline of {parallel.pipe} devices needs as many microbatches or more, for with fewer "
      f"some always idle: train.num_micro={num_micro}; set train.num_micro={parallel.pipe} or more"
    )
  if vocabulary is not None and table.vocabulary is None:
    table = with_vocabulary(table, vocabulary)
  return table


def vocabulary_of(parallel: Parallel) -> Vocabulary | None:
  """Returns how the head over all devices works; None where it is on the last stage."""
  algorithms = {"one_barrier": 2, "two_barriers": 1}
  return None if parallel.head == "last" else Vocabulary(algorithms[parallel.head])


def stages_of(parallel: Parallel, model: TransformerConfig, vocab_size: int) -> Stages:
  """Returns the stages of a model: those that are asked for, or cut by the FLOPs of products.

  Raises:
    InputError: there are fewer layers than stages, or not those that are asked for.
  """
  own = own_table(parallel.pipeline, vocabulary_of(parallel))
  table = own if own is not None else table_of(parallel, 2 * parallel.pipe)
  placement = table.placement
  stages, layers, spread = placement.num_stages, model.num_layers, parallel.head != "last"
  if layers < stages:
    raise InputError(
      f"pipeline {shown(parallel.pipeline)} of {parallel.pipe} devices has {stages} stages of at "
      f"least one layer, and the model has {layers}; set parallel.pipe lower, or take another "
      "pipeline"
    )
  if parallel.stages:
    check_counts(parallel.stages, layers, stages)
    return Stages(parallel.stages, placement.device_of, spread)
  costs = [
    float(block.active_params(model.dim))
    for group in model.stack for _ in range(group.repeats) for block in group.pattern
  ]  # fmt: skip
  costs[-1] += 0.0 if spread else model.dim * vocab_size  # the head's, on the last stage
  return Stages(cut_by_cost(costs, stages), placement.device_of, spread)


def placed_groups(
  parallel: Parallel, model: TransformerConfig, vocab_size: int
) -> LayerGroupSizes | None:
  """Returns how a model's layers are grouped in memory over stages; None without a pipeline."""
  if parallel.pipe == 1:
    return None
  return stages_of(parallel, model, vocab_size).placed(layer_group_sizes(model.stack))
