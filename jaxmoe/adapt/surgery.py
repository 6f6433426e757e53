"""Operations on the experts of a model: its new record, and where each of its experts comes from.

An operation is a function from a `TransformerConfig` to a `Surgery`, which moves no array;
parameters and optimizer state are carried over by `transplant.py`. What they do to the outputs:

- `insert` adds inactive experts (`MoEConfig.num_inactive`): every router and dispatcher gives the
  same bits.
- `open_inactive` lets the router know them. Outputs change. (ModuleFormer, Shen et al. 2023,
  section 3.4, inserts and opens at once; the old ones are then frozen, see `optim.Optim.frozen`.
  With strong weight decay the new ones take fewer of the tokens that old ones serve.)
- `prune` keeps the experts used most, each layer its own (ibid., section 3.3). Where none of those
  dropped was chosen the outputs stay, up to rounding, if the router normalises its weights or
  scores each expert by itself; a bare softmax has a smaller sum afterwards.
- `clone` copies every expert and its router column, and sends a token to as many more. For a
  token-local `TopK` the outputs stay, up to rounding.
- `upcycle` makes a MoE of dense blocks, every expert a copy of the MLP (Komatsuzaki et al. 2022).
  Where the weights of a token's experts sum to 1 the outputs stay, up to rounding, unless copies
  are made to differ (`variety.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxmoe.adapt.variety import Variety
from jaxmoe.core.errors import InputError
from jaxmoe.models.block import MLPConfig
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig

NEW = -1
ALIKE = Variety()
Origins = tuple[int, ...]
"""For each expert of a layer the old expert it is a copy of, or NEW."""


@dataclasses.dataclass(frozen=True)
class Surgery:
  """What an operation makes of a model.

  Attributes:
    model: The new record.
    experts: Origins of the weights of each expert, by depth of the MoE layer.
    routed: Origins of what the router knows of each open expert, by depth.
    from_dense: Whether experts are copies of the dense network of the block.
    variety: How these copies are made to differ.
  """

  model: TransformerConfig
  experts: Mapping[int, Origins]
  routed: Mapping[int, Origins]
  from_dense: bool = False
  variety: Variety = ALIKE


def insert(model: TransformerConfig, num: int, like: Sequence[int] = ()) -> Surgery:
  """Adds `num` inactive experts to every MoE layer.

  Args:
    model: The record.
    num: At least 1.
    like: The experts that they are copies of, `num` of them; none for fresh weights.

  Raises:
    InputError: a number that does not fit.
  """
  layers = _moe_layers(model)
  if num < 1:
    raise InputError(f"at least one expert must be inserted: insert={num}")
  added = _added(num, like, layers)
  return Surgery(
    _changed(
      model, lambda moe: _grown(moe, moe.num_experts + num, num_inactive=moe.num_inactive + num)
    ),
    {depth: (*range(moe.num_experts), *added) for depth, moe in layers.items()},
    {depth: tuple(range(moe.num_routable)) for depth, moe in layers.items()},
  )


def open_inactive(model: TransformerConfig, like: Sequence[int] = ()) -> Surgery:
  """Opens every inactive expert.

  Args:
    model: The record.
    like: The open experts whose router columns and buffers theirs are copies of, one for each;
      none for fresh ones.

  Raises:
    InputError: there are none, or `like` does not fit.
  """
  layers = _moe_layers(model)
  if not all(moe.num_inactive for moe in layers.values()):
    raise InputError("no expert is inactive in some MoE layer, so none can be opened; insert first")
  if len({moe.num_inactive for moe in layers.values()}) > 1 and like:
    raise InputError("layers have different numbers of inactive experts; open them without `like`")
  opened = {depth: _added(moe.num_inactive, like, layers) for depth, moe in layers.items()}
  return Surgery(
    _changed(model, lambda moe: dataclasses.replace(moe, num_inactive=0)),
    {depth: tuple(range(moe.num_experts)) for depth, moe in layers.items()},
    {depth: (*range(moe.num_routable), *opened[depth]) for depth, moe in layers.items()},
  )


def prune(model: TransformerConfig, usage_LE: np.ndarray, keep: int) -> Surgery:
  """Keeps the `keep` most used experts of each MoE layer, in their order; inactive ones go.

  Args:
    model: The record.
    usage_LE: How often each open expert was chosen, a row a MoE layer in order of depth; of two
      experts used alike the lower one stays.
    keep: At least the number a token is sent to.

  Raises:
    InputError: usage of another shape or not a number, or a number that does not fit.
  """
  layers = _moe_layers(model)
  widths = [moe.num_routable for moe in layers.values()]
  if [len(row) for row in usage_LE] != widths:
    raise InputError(
      f"usage needs a row for each MoE layer, an entry for each expert, {widths}: it has "
      f"{[len(row) for row in usage_LE]}"
    )
  if not all(np.isfinite(row).all() and (np.asarray(row) >= 0).all() for row in usage_LE):
    raise InputError("usage must be finite and not negative; count choices again")
  if not 1 <= keep <= min(widths):
    raise InputError(f"prune_to must lie between 1 and {min(widths)}, the experts: prune_to={keep}")
  kept = {
    depth: tuple(sorted(np.argsort(-np.asarray(row, np.float64), kind="stable")[:keep].tolist()))
    for depth, row in zip(layers, usage_LE)
  }
  return Surgery(_changed(model, lambda moe: _grown(moe, keep, num_inactive=0)), kept, kept)


def clone(model: TransformerConfig, times: int) -> Surgery:
  """Makes every expert `times` experts, next to each other, and activates as many more.

  Raises:
    InputError: a number below 2, or inactive experts.
  """
  layers = _moe_layers(model)
  if times < 2:
    raise InputError(f"cloning needs at least 2 of each: clone={times}")
  if any(moe.num_inactive for moe in layers.values()):
    raise InputError("some experts are inactive; open them first, or prune them")
  origins = {
    depth: tuple(np.repeat(range(moe.num_experts), times).tolist()) for depth, moe in layers.items()
  }

  def more(moe: MoEConfig) -> MoEConfig:
    # The copies share what a softmax or a division by the sum gives the one; other scores add up.
    shared = moe.router.normalize or moe.router.score == "softmax"
    scale = moe.router.scale if shared else moe.router.scale / times
    return dataclasses.replace(
      _grown(moe, moe.num_experts * times),
      num_active=moe.num_active * times,
      router=dataclasses.replace(moe.router, scale=scale),
    )

  return Surgery(_changed(model, more), origins, origins)


def upcycle(model: TransformerConfig, moe: MoEConfig, variety: Variety = ALIKE) -> Surgery:
  """Turns every dense feed-forward part into `moe`, whose experts take its width.

  Args:
    model: The record.
    moe: The layer.
    variety: How its experts are made to differ.

  Raises:
    InputError: no block is dense, or `moe` cannot be made of copies.
  """
  depths = [depth for depth, ffn in enumerate(model.ffns) if isinstance(ffn, MLPConfig)]
  if not depths:
    raise InputError("no block has a dense feed-forward part (mlp); there is nothing to upcycle")
  if not isinstance(moe.experts, SwiGLU) or moe.num_inactive or moe.shared_mlp_dim:
    raise InputError("upcycling makes swiglu experts, open, without a shared one; ask for these")
  origins = dict.fromkeys(depths, (0,) * moe.num_experts)
  routed = dict.fromkeys(depths, (NEW,) * moe.num_experts)

  def sparse(ffn: MLPConfig | MoEConfig) -> MLPConfig | MoEConfig:
    if isinstance(ffn, MoEConfig):
      return ffn
    return dataclasses.replace(moe, experts=SwiGLU(mlp_dim=ffn.mlp_dim))

  return Surgery(model.map_ffns(sparse), origins, routed, True, variety)


def _added(num: int, like: Sequence[int], layers: Mapping[int, MoEConfig]) -> Origins:
  """Returns the origins of `num` experts that are added."""
  if not like:
    return (NEW,) * num
  fewest = min(moe.num_routable for moe in layers.values())
  if len(like) != num or not all(0 <= expert < fewest for expert in like):
    raise InputError(
      f"like must name an expert below {fewest} for each of the {num} added: like={list(like)}"
    )
  return tuple(like)


def _grown(moe: MoEConfig, num_experts: int, num_inactive: int = 0) -> MoEConfig:
  return dataclasses.replace(moe, num_experts=num_experts, num_inactive=num_inactive)


def _moe_layers(model: TransformerConfig) -> dict[int, MoEConfig]:
  """Returns the record of each MoE layer by depth, at least one."""
  layers = {depth: ffn for depth, ffn in enumerate(model.ffns) if isinstance(ffn, MoEConfig)}
  if not layers:
    raise InputError("the model has no MoE layer; upcycle it first")
  return layers


def _changed(
  model: TransformerConfig, change: Callable[[MoEConfig], MoEConfig]
) -> TransformerConfig:
  return model.map_ffns(lambda ffn: change(ffn) if isinstance(ffn, MoEConfig) else ffn)
