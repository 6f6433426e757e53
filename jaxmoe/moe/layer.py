"""The MoE layer: route -> plan -> move rows -> experts -> combine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.config_io import choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.core.renamed import renamed
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weight_formats import dot
from jaxmoe.moe.balance import BALANCE, LoadBalance, RouterZ
from jaxmoe.moe.dispatch import (
  DISPATCHERS,
  EXCHANGES,
  AllToAll,
  Counts,
  DeviceGroup,
  DispatchContext,
  Dropless,
)
from jaxmoe.moe.dispatch.placement import check_placement
from jaxmoe.moe.expert_outputs import ExpertOutputs, field_of
from jaxmoe.moe.experts import EXPERTS, SwiGLU
from jaxmoe.moe.experts.family import ExpertGroup, with_values
from jaxmoe.moe.experts.swiglu import SwiGLUMLP
from jaxmoe.moe.routers import ROUTERS, Adaptive, TopK
from jaxmoe.moe.routers.router import RouterStatistics
from jaxmoe.moe.routing import RouterSums, Routing, sum_routing, sum_rows
from jaxmoe.ops.soft_tree import TreeSums


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """A layer of experts.

  Attributes:
    num_experts: E, how many experts the layer has.
    num_active: A, how many each token is sent to.
    router: Which experts a token is sent to.
    experts: What an expert computes.
    dispatch: How rows reach experts, and what happens where too many do.
    exchange: How rows reach experts on other devices, where experts are spread over several.
    shared_mlp_dim: Width of a shared expert that every token passes; 0 for none.
    shared_gate: Whether its output is multiplied by sigmoid(w x) (Qwen2-MoE).
    balance: Losses that keep the load of experts even.
    num_inactive: How many experts, the last ones, no token is sent to: they have weights, but the
      router does not know them, so that outputs are those of a layer without them, bit for bit.
    placement: The expert each slot holds, several slots for one of many rows; empty for one each.
  """

  num_experts: int = 8
  num_active: int = 2
  router: Any = choice(ROUTERS, TopK())
  experts: Any = choice(EXPERTS, SwiGLU(mlp_dim=128))
  dispatch: Any = choice(DISPATCHERS, Dropless())
  exchange: Any = choice(EXCHANGES, AllToAll())
  shared_mlp_dim: int = renamed("shared_hidden", 0)
  shared_gate: bool = False
  balance: tuple[Any, ...] = choice(BALANCE, (LoadBalance(), RouterZ()))
  num_inactive: int = renamed("closed", 0)
  placement: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    if not 1 <= self.num_active <= self.num_experts:
      raise InputError(
        "num_active must lie between 1 and num_experts: "
        f"num_active={self.num_active}, num_experts={self.num_experts}"
      )
    if self.shared_mlp_dim < 0:
      raise InputError(f"shared_mlp_dim must not be negative: shared_mlp_dim={self.shared_mlp_dim}")
    if self.shared_gate and not self.shared_mlp_dim:
      raise InputError(
        "shared_gate needs a shared expert; set shared_mlp_dim, or shared_gate=false"
      )
    if not 0 <= self.num_inactive <= self.num_experts - self.num_active:
      raise InputError(
        "num_inactive must leave num_active experts open: num_inactive="
        f"{self.num_inactive}, num_experts={self.num_experts}, num_active={self.num_active}"
      )
    if self.num_inactive and self.experts.mixed:
      raise InputError(
        f"{type(self.experts).__name__} has several kinds of experts, which cannot be inactive: "
        f"num_inactive={self.num_inactive}; set num_inactive=0"
      )
    self.router.check(self.num_routable, self.num_active)
    self.experts.check(self.num_experts)
    check_placement(
      self.placement, self.num_routable - self.experts.num_zero_compute(self.num_experts)
    )
    names = [aux_loss.name for aux_loss in self.balance]
    for aux_loss in self.balance:
      aux_loss.check(self)
      if aux_loss.adaptive and not isinstance(self.router, Adaptive):
        raise InputError(
          f"{aux_loss.name} is to follow the router's factor, and {type(self.router).__name__} has "
          "none: adaptive=True; set adaptive=false, or use the router relu or adaptive"
        )
      if names.count(aux_loss.name) > 1:
        raise InputError(
          f"balance has two losses called {aux_loss.name}; add up their weights, or change a scope"
        )

  def check_causal(self) -> None:
    """Refuses to serve a causal model where a later token may change what an earlier one gets.

    Raises:
      InputError: what, why and the cure in one line.
    """
    self.router.check_causal()
    self.dispatch.check_causal()

  @property
  def depends_on_shard(self) -> bool:
    """Whether what a token gets differs with the tokens that lie on one device with it."""
    return any(part.depends_on_shard for part in (self.router, self.dispatch, self.exchange))

  @property
  def drop_limit(self) -> float:
    """The share of its choices above which drops end the run."""
    return min(self.dispatch.drop_limit, self.exchange.drop_limit)

  def build(self, init: Init, dim: int, parallel: ParallelContext = ONE_DEVICE) -> MoELayer:
    """Returns the module with its weights."""
    return MoELayer(self, init, dim, parallel)

  def active_params(self, dim: int) -> int:
    """Returns how many parameters act on one token."""
    shared = 3 * dim * self.shared_mlp_dim + dim * self.shared_gate
    num_active = round(self.router.mean_active(self.num_active))
    routed = self.experts.active_params(dim, self.num_experts, num_active)
    return self.router.num_params(dim, self.num_routable) + routed + shared

  @property
  def num_routable(self) -> int:
    """How many experts, the first ones, the router knows; sums and scores are over these."""
    return self.num_experts - self.num_inactive

  @property
  def needs_sequence_totals(self) -> bool:
    """Whether a balance loss needs the sums of each row of the batch."""
    return any(aux_loss.needs_sequence_totals for aux_loss in self.balance)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "router",
    "dropped",
    "per_sequence",
    "statistics",
    "routing",
    "spilled",
    "idle",
    "domain_sums",
  ],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class MoESums:
  """What a layer reports beside its output: sums over the tokens it saw.

  Attributes:
    router: What balance losses and load metrics are computed from.
    dropped: float32 numbers of dropped choices, by reason.
    per_sequence: The router's sums row by row of the batch, where `Tokens.per_sequence` or
      a loss needs them.
    statistics: What the buffers of the router are updated from, where it has any.
    routing: Every token's choices, where `Tokens.return_routing` asks for them.
    spilled: float32 numbers of choices that another expert took, by reason.
    idle: float32 number of choices of experts that take no rows.
    domain_sums: That of `Routing`, sums too.
  """

  router: RouterSums
  dropped: dict[str, jax.Array]
  per_sequence: RouterSums | None = None
  statistics: RouterStatistics | None = None
  routing: Routing | None = None
  spilled: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  idle: jax.Array | float = 0.0
  domain_sums: TreeSums | None = None


class MoELayer(nnx.Module):
  """The parts of a MoE layer, in the order in which a token meets them."""

  def __init__(
    self, config: MoEConfig, init: Init, dim: int, parallel: ParallelContext = ONE_DEVICE
  ):
    self.dispatch, self.exchange, self.parallel = config.dispatch, config.exchange, parallel
    self.num_experts, self.num_routable = config.num_experts, config.num_routable
    self.num_zero_compute = config.experts.num_zero_compute(config.num_experts)
    self.placement = config.placement
    self.needs_sequence_totals = config.needs_sequence_totals
    self.router = config.router.build(init / "router", dim, config.num_routable, config.num_active)
    self.experts = config.experts.build(init / "experts", dim, config.num_experts)
    width = config.shared_mlp_dim
    self.shared = SwiGLUMLP(init / "shared", dim, width) if width else None
    weight = functools.partial(init.weight, "shared_gate", (dim, 1), ("embed", None), fan_in=dim)
    self.shared_gate = weight() if config.shared_gate else None

  def __call__(
    self, x_BLD: jax.Array, tokens: Tokens, previous_logits: Any, keys: Keys | None
  ) -> tuple[jax.Array, Any, MoESums]:
    """Returns (B, L, D) in x.dtype, the logits for the next layer and the sums.

    A token that is not valid gets zeros from the experts.
    """
    whole_BLD, routing, previous_logits = self.route(x_BLD, tokens, previous_logits, keys)
    y_BLD, sums = self.apply_experts(whole_BLD, routing, tokens, keys)
    return y_BLD, previous_logits, sums

  def route(
    self, x_BLD: jax.Array, tokens: Tokens, previous_logits: Any, keys: Keys | None
  ) -> tuple[jax.Array, Routing, Any]:
    """Returns all of a row's tokens, (B, L, D), their routing and the previous_logits for the next
    layer.

    The first half of the layer. Only the router's weights are read; the routing says which experts
    `apply_experts` will need, so that they may be fetched or predicted in between.
    """
    whole_BLD = self.parallel.all_gather_sequence(x_BLD)
    with jax.named_scope("route"):
      routing, previous_logits = self.router(
        whole_BLD.reshape(-1, x_BLD.shape[-1]),
        tokens,
        previous_logits,
        keys,
        self.parallel.chooser,
      )
    return whole_BLD, routing, previous_logits

  def apply_experts(
    self, whole_BLD: jax.Array, routing: Routing, tokens: Tokens, keys: Keys | None
  ) -> tuple[jax.Array, MoESums]:
    """Returns (B, L, D) in x.dtype and the sums: the second half, from what `route` returned.

    The router's weights are not read.
    """
    x_TD = whole_BLD.reshape(-1, whole_BLD.shape[-1])
    keys = keys / "dispatch" if keys else None
    found, counts = self._experts(whole_BLD, routing, tokens.values, keys)
    if self.shared is not None:
      with jax.named_scope("shared"):
        found = found.add("partial", self._shared(x_TD).reshape(whole_BLD.shape))
    with jax.named_scope("sums"):
      sums = layer_sums(routing, tokens, counts, self.needs_sequence_totals, self.num_zero_compute)
    return found.reduce(self.parallel), sums

  def _shared(self, x_TD: jax.Array) -> jax.Array:
    """Returns the shared expert's output, times its gate (float32 inside) where there is one."""
    assert self.shared is not None
    y_TD = self.shared(x_TD)
    if self.shared_gate is None:
      return y_TD
    gate_T1 = dot(self.shared_gate.get_value(), x_TD.astype(jnp.float32), "td,dg->tg")
    return (jax.nn.sigmoid(gate_T1) * y_TD.astype(jnp.float32)).astype(y_TD.dtype)

  def _experts(
    self, x_BLD: jax.Array, routing: Routing, values: Mapping[str, jax.Array], keys: Keys | None
  ) -> tuple[ExpertOutputs, Counts]:
    """Returns the combined outputs of all kinds of experts, and drops and spills by reason."""
    experts = self._open()
    routing = experts.adjust_weights(routing)
    rows_BLD = experts.project_in(x_BLD.reshape(-1, x_BLD.shape[-1])).reshape(*x_BLD.shape[:2], -1)
    found, counts = ExpertOutputs(), Counts({}, {})
    for part in experts.groups(self.num_routable):
      chosen = routing
      if (part.start, part.stop) != (0, self.num_routable):
        chosen = routing.part(part.start, part.stop)
      chosen = with_values(chosen, values, part.module)
      where, y_BLD, more = self._part(part, rows_BLD, chosen, keys)
      counts = Counts(*map(_add, counts, more))
      y_TD = experts.project_out(y_BLD.reshape(-1, y_BLD.shape[-1]))
      found = found.add(where, y_TD.reshape(*y_BLD.shape[:2], -1))
    return found, counts

  def _part(
    self, part: ExpertGroup, x_BLD: jax.Array, routing: Routing, keys: Keys | None
  ) -> tuple[str, jax.Array, Counts]:
    """Returns what experts of one kind make of the tokens, and its field of `ExpertOutputs`."""
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    if not part.takes_rows:
      return "replicated", part.module.at_tokens(x_TD, routing).reshape(x_BLD.shape), Counts({}, {})
    context, degree = self._context(part, keys), self.parallel.expert_degree
    if degree == 1 or (part.stop - part.start) % degree:
      y_TD, counts = self.dispatch(x_TD, routing, part.module, context)
      return field_of(part.module), y_TD.reshape(x_BLD.shape), counts
    split = self.parallel.splits_tokens
    if split:
      x_BLD, routing = _split(self.parallel, x_BLD, routing)
      x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    group = DeviceGroup(*self.parallel.expert_mesh)
    y_TD, counts = self.exchange(self.dispatch, x_TD, routing, part.module, context, group)
    counts = self.parallel.psum_tensor(counts) if split else counts
    return "sharded" if split else field_of(part.module), y_TD.reshape(x_BLD.shape), counts

  def _open(self) -> Any:
    """Returns the experts without the inactive ones; their weights are copied where any are."""
    if self.num_routable == self.num_experts:
      return self.experts
    graph, state = nnx.split(self.experts)

    def cut(leaf: nnx.Variable) -> nnx.Variable:
      if leaf.get_metadata()["dims"][:1] != ("expert",):
        return leaf
      return leaf.replace(jax.tree.map(lambda part: part[: self.num_routable], leaf.get_value()))

    is_leaf = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(cut, state, is_leaf=is_leaf))

  def _context(self, part: ExpertGroup, keys: Keys | None) -> DispatchContext:
    """Returns what the dispatcher is told of the rest of the layer."""
    slots = tuple(e - part.start for e in self.placement if part.start <= e < part.stop)
    num_slots = len(self.placement) or self.num_routable - self.num_zero_compute
    mine = len(slots) or part.stop - part.start
    here = keys / str(part.start) if keys else None
    return DispatchContext(
      num_slots - mine, self.num_zero_compute, slots, here, self.parallel.chooser
    )


def _split(
  parallel: ParallelContext, x_BLD: jax.Array, routing: Routing
) -> tuple[jax.Array, Routing]:
  """Returns a device's share of the tokens that its tensor group has, and of their routing."""
  rows = x_BLD.shape[:2]

  def share(leaf_TF: jax.Array) -> jax.Array:
    part = parallel.slice_tokens(leaf_TF.reshape(*rows, *leaf_TF.shape[1:]))
    return part.reshape(-1, *leaf_TF.shape[1:])

  return parallel.slice_tokens(x_BLD), jax.tree.map(share, routing)


def layer_sums(
  routing: Routing,
  tokens: Tokens,
  counts: Counts,
  needs_sequence_totals: bool,
  num_zero_compute: int = 0,
) -> MoESums:
  """Returns what a layer reports of its routing; row by row too where that is needed."""
  valid_T = tokens.valid.reshape(-1)
  per_sequence = None
  if tokens.per_sequence or needs_sequence_totals:
    per_sequence = sum_rows(routing, valid_T, tokens.id.shape[0])
    router = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), per_sequence)
  else:
    router = sum_routing(routing, valid_T)
  margins_TE = routing.margins_TE
  statistics = None
  if margins_TE is not None:
    statistics = RouterStatistics(margins_TE, valid_T, routing.num_active)
  record = routing if tokens.return_routing else None
  idle = jnp.sum(router.counts_E[router.counts_E.shape[0] - num_zero_compute :])
  return MoESums(
    router,
    counts.dropped,
    per_sequence,
    statistics,
    record,
    counts.spilled,
    idle,
    routing.domain_sums,
  )


def _add(some: dict[str, jax.Array], more: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the numbers of both, summed by reason."""
  return some | {reason: some.get(reason, 0.0) + number for reason, number in more.items()}
