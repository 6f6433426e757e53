"""The base of routers: gate -> scores -> a pure rule that selects -> weights.

A router is a frozen record derived from `Router`. It states its settings, what its decision
depends on, and one pure function, `select`; gate and score function are its parts, so that every
rule works with all of them. Its module (`RouterModule`) is the same for all: it holds the gate's
parameters and the rule's buffers, and writes to neither.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.core.backends import HERE, Chooser
from jaxmoe.core.config_io import choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.routers.gates import GATES, LinearGateConfig
from jaxmoe.moe.routers.scores import SCORES
from jaxmoe.moe.routing import RouterSums, Routing
from jaxmoe.ops import top_k

Buffers = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class RouterInputs:
  """What a rule decides from.

  Attributes:
    logits_TE: float32, from the gate.
    scores_TE: float32, of the router's score function.
    tokens: Of shape (B, L) with B * L = T.
    num_active: A, how many experts a token is sent to, or at most if the rule decides that.
    buffers: What the rule keeps from step to step; no gradient.
    keys: Randomness of the forward pass; None where there is none (evaluation, serving).
    x_TD: float32, the tokens themselves, for rules with parameters of their own.
    parameters: Those, by name.
    chooser: What chooses back ends.
  """

  logits_TE: jax.Array
  scores_TE: jax.Array
  tokens: Tokens
  num_active: int
  buffers: Buffers
  keys: Keys | None
  x_TD: jax.Array
  parameters: dict[str, jax.Array]
  chooser: Chooser = HERE

  def top_k(self, rank_TE: jax.Array, num: int) -> jax.Array:
    """Returns (T, num) int32, the experts of the highest rank; ties go to the lower expert."""
    sizes = {"T": rank_TE.shape[0], "E": rank_TE.shape[1], "A": num}
    backend = self.chooser.choose("top_k", top_k.BACKENDS, rank_TE.dtype, sizes)
    return backend(rank_TE, num)

  def draw(
    self, name: str, drawn: Callable[[jax.Array, tuple[int, ...]], jax.Array], *dims: int
  ) -> jax.Array:
    """Returns (T, ...) of a distribution of `jax.random`, by `name` and place in the row."""
    assert self.keys is not None, "a rule that draws looks first whether it may"
    return self.tokens.draw(functools.partial(drawn, self.keys(name)), *dims)

  @property
  def valid_T(self) -> jax.Array:
    """(T,) bool: which tokens count."""
    return self.tokens.valid.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Selection:
  """What a rule chose; the fields are those of `Routing`.

  Attributes:
    valid_TA: None where every choice of a valid token counts.
  """

  expert_TA: jax.Array
  weight_TA: jax.Array
  valid_TA: jax.Array | None = None
  load_TE: jax.Array | None = None
  margins_TE: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Router:
  """The base of routers; a rule overrides `select`, and what else it needs.

  Attributes:
    gate: What makes the logits.
    score: What makes scores of them: softmax, sigmoid, sqrt_softplus or relu.
    normalize: Whether the weights of a token's chosen experts are divided by their sum.
    scale: What weights are multiplied by at last (DeepSeek-V3's routed scaling factor).
  """

  gate: Any = choice(GATES, LinearGateConfig())
  score: Literal["softmax", "sigmoid", "sqrt_softplus", "relu"] = "softmax"
  normalize: bool = True
  scale: float = 1.0

  fixed_active: ClassVar[int | None] = None
  """How many experts a token is sent to, for a rule that knows only one number."""
  depends_on: ClassVar[Literal["token", "batch"]] = "token"
  """Whether a token is routed by itself, or by all tokens of the batch, later ones too."""
  varies: ClassVar[bool] = False
  """Whether the number of a token's experts differs from token to token."""
  draws: ClassVar[bool] = False
  """Whether a token is routed by chance, or by its place among the tokens of its device."""

  def __post_init__(self) -> None:
    if self.scale <= 0:
      raise InputError(f"scale must be above 0: scale={self.scale}")
    if self.normalize and self.fixed_active == 1:
      raise InputError(
        "the weight of a token's only expert must be its score, or the gate learns nothing: "
        "normalize=True; set normalize=false"
      )

  def check(self, num_experts: int, num_active: int) -> None:
    """Refuses numbers of experts that the rule cannot serve.

    Raises:
      InputError: what, why and the cure in one line.
    """
    self.gate.check(num_experts)
    if self.fixed_active not in (None, num_active):
      raise InputError(
        f"{type(self).__name__} sends a token to {self.fixed_active}: num_active={num_active}; "
        f"set num_active={self.fixed_active}"
      )

  def mean_active(self, num_active: int) -> float:
    """Returns how many experts a token is sent to in the mean, or at most if nobody knows."""
    return num_active

  @property
  def sum_to_1(self) -> bool:
    """Whether a token's scores are shares of 1, which balance losses take as they are."""
    return self.score == "softmax"

  @property
  def depends_on_shard(self) -> bool:
    """Whether a token's experts differ with the tokens that lie on one device with it."""
    return self.draws or self.depends_on == "batch"

  def check_causal(self) -> None:
    """Refuses to serve a causal model where a later token may change an earlier one's experts.

    Raises:
      InputError: what, why and the cure in one line.
    """

  def build(self, init: Init, dim: int, num_experts: int, num_active: int) -> RouterModule:
    """Returns the module with the gate's parameters and the rule's own and its buffers."""
    return RouterModule(self, init, dim, num_experts, num_active)

  def parameters(self, init: Init, dim: int, num_experts: int) -> dict[str, nnx.Param]:
    """Returns the parameters of the rule itself, beside the gate's."""
    del init, dim, num_experts
    return {}

  def num_params(self, dim: int, num_experts: int) -> int:
    """Returns the number of the gate's and the rule's parameters."""
    return self.gate.num_params(dim, num_experts)

  def buffers(self, num_experts: int) -> dict[str, np.ndarray]:
    """Returns the first values of what the rule keeps from step to step, float32.

    Adaptive balance losses are multiplied by what is called `pressure`, of shape (1,).
    """
    del num_experts
    return {}

  def update(
    self, buffers: Buffers, sums: RouterSums, statistics: RouterStatistics | None
  ) -> Buffers:
    """Returns the buffers after a step, from the sums of all its tokens."""
    del sums, statistics
    return buffers

  def gate_input(self, x_TD: jax.Array, tokens: Tokens, keys: Keys | None) -> jax.Array:
    """Returns what the gate sees in place of the tokens, such as tokens with noise."""
    del tokens, keys
    return x_TD

  def select(self, inputs: RouterInputs) -> Selection:
    """Returns the experts of each token and their weights; pure."""
    raise NotImplementedError

  def combine_weights(
    self, scores_TE: jax.Array, expert_TA: jax.Array, valid_TA: jax.Array | None = None
  ) -> jax.Array:
    """Returns (T, A) float32: scores of chosen experts, over their sum if asked, times `scale`.

    A choice that is not valid weighs nothing and counts in no sum.
    """
    weight_TA = jnp.take_along_axis(scores_TE, expert_TA, axis=1)
    if valid_TA is not None:
      weight_TA = jnp.where(valid_TA, weight_TA, 0)
    if self.normalize:
      # The floor's square must be a float32, or choices without a score have no finite gradient.
      weight_TA = weight_TA / jnp.maximum(jnp.sum(weight_TA, axis=1, keepdims=True), 1e-15)
    return weight_TA if self.scale == 1 else weight_TA * self.scale

  def weights_of_replayed(
    self, inputs: RouterInputs, expert_TA: jax.Array, valid_TA: jax.Array
  ) -> jax.Array:
    """Returns (T, A) float32: what experts weigh that the rule did not choose itself."""
    return self.combine_weights(inputs.scores_TE, expert_TA, valid_TA)


@dataclasses.dataclass(frozen=True)
class BatchRouter(Router):
  """The base of rules that look at all tokens of a batch at once.

  Attributes:
    allow_future: Whether to serve a causal model although a later token may change an earlier
      one's experts, so that training sees what generation cannot.
  """

  allow_future: bool = False

  depends_on: ClassVar[Literal["token", "batch"]] = "batch"

  def check_causal(self) -> None:
    """Refuses to serve a causal model unless that is allowed."""
    if not self.allow_future:
      raise InputError(
        f"{type(self).__name__} routes a token by later ones, which no causal model can do when "
        "it generates; set allow_future=true to train with it all the same"
      )


@dataclasses.dataclass(frozen=True)
class RouterStatistics:
  """What a router's buffers are updated from beside sums: values of every token of a step.

  Attributes:
    margins_TE: float32, of `Routing`.
    valid_T: bool, which tokens count.
    active: How many experts a token is sent to in the mean.
  """

  margins_TE: jax.Array
  valid_T: jax.Array
  active: float


jax.tree_util.register_dataclass(RouterStatistics, ["margins_TE", "valid_T"], ["active"])


class RouterModule(nnx.Module):
  """The gate of a router, the parameters of its rule and its buffers."""

  def __init__(self, config: Router, init: Init, dim: int, num_experts: int, num_active: int):
    self.config = config
    self.num_active = num_active
    self.gate = config.gate.build(init / "gate", dim, num_experts)
    self.rule = nnx.Dict(config.parameters(init / "rule", dim, num_experts))
    first = config.buffers(num_experts)
    self.buffers = nnx.Dict({name: init.buffer(value) for name, value in first.items()})

  def __call__(
    self,
    x_TD: jax.Array,
    tokens: Tokens,
    previous_logits: Any,
    keys: Keys | None,
    chooser: Chooser = HERE,
  ) -> tuple[Routing, Any]:
    """Returns the routing of T = B * L tokens, all float32, and the logits for the next
    layer."""
    input_TD = self.config.gate_input(x_TD, tokens, keys)
    logits_TE, previous_logits = self.gate(input_TD, previous_logits)
    scores_TE = SCORES[self.config.score](logits_TE)
    buffers = {name: jax.lax.stop_gradient(leaf[...]) for name, leaf in self.buffers.items()}
    parameters = {name: leaf.get_value() for name, leaf in self.rule.items()}
    inputs = RouterInputs(
      logits_TE,
      scores_TE,
      tokens,
      self.num_active,
      buffers,
      keys,
      x_TD.astype(jnp.float32),
      parameters,
      chooser,
    )
    if tokens.replayed_experts is None:
      chosen = self.config.select(inputs)
    else:
      chosen = self._replay(inputs, tokens.replayed_experts)
    valid_TA = jnp.broadcast_to(inputs.valid_T[:, None], chosen.expert_TA.shape)
    if chosen.valid_TA is not None:
      valid_TA = valid_TA & chosen.valid_TA
    compares = tokens.compare is not None and self.config.gate.decides
    adaptive_coefficient_T = None
    if "pressure" in buffers:
      adaptive_coefficient_T = jnp.broadcast_to(buffers["pressure"], inputs.valid_T.shape)
    routing = Routing(
      expert_TA=chosen.expert_TA,
      weight_TA=chosen.weight_TA,
      valid_TA=valid_TA,
      scores_TE=scores_TE,
      log_z_T=jax.nn.logsumexp(logits_TE, axis=-1),
      load_TE=chosen.load_TE,
      margins_TE=chosen.margins_TE,
      active=self.config.mean_active(self.num_active),
      adaptive_coefficient_T=adaptive_coefficient_T,
      domain_sums=self.gate.domain_sums(input_TD, tokens) if compares else None,
      sum_to_1=self.config.sum_to_1,
    )
    return routing, previous_logits

  def _replay(self, inputs: RouterInputs, replayed_BLA: jax.Array) -> Selection:
    """Takes the given choices, weighed as this router would; a choice below 0 is none."""
    replayed_TA = replayed_BLA.reshape(-1, replayed_BLA.shape[-1])
    valid_TA = replayed_TA >= 0
    expert_TA = jnp.maximum(replayed_TA, 0)
    return Selection(
      expert_TA, self.config.weights_of_replayed(inputs, expert_TA, valid_TA), valid_TA
    )
