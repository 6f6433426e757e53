"""A row knows its token: what weights ask of it comes along, under every dispatcher and
exchange."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxmoe.adapt.low_rank import LowRank
from jaxmoe.core.backends import HERE, Chooser
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weight_formats import grouped_dot, token_values
from jaxmoe.moe.dispatch import DISPATCHERS, EXCHANGES, Capacity, Dense, DeviceGroup, Dropless
from jaxmoe.moe.dispatch.dispatcher import DispatchContext
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routing import Routing

T, D, E, A, F, TASKS = 24, 4, 8, 2, 3, 3
SLOTS = (0, 1, 2, 3, 4, 5, 6, 7, 5, 0)
MEMBERS = {name: instance for name, (_, instance) in DISPATCHERS.items()} | {
  "capacity, tight": Capacity(0.5),
  "dropless, ragged": Dropless(),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerTask:
  """A weight (E, D, *out) whose product gets what its expert adds for the task of the token."""

  base: jax.Array
  bias_EKGF: jax.Array

  token_values: ClassVar[tuple[str, ...]] = ("task",)

  def grouped_dot(self, rows_RD, groups):
    task_RK = jax.nn.one_hot(groups.values["task"], TASKS, dtype=rows_RD.dtype)
    return grouped_dot(self.base, rows_RD, groups) + grouped_dot(self.bias_EKGF, task_RK, groups)


def draw(seed=0):
  """Returns tokens, a routing over experts with choices that do not count, and tasks."""
  rng = np.random.default_rng(seed)
  expert_TA = np.stack([rng.permutation(E)[:A] for _ in range(T)]).astype(np.int32)
  routing = Routing(
    expert_TA=jnp.asarray(expert_TA),
    weight_TA=jnp.asarray(rng.random((T, A)), jnp.float32),
    valid_TA=jnp.asarray(rng.random((T, A)) < 0.8),
    scores_TE=jnp.asarray(rng.random((T, E)), jnp.float32),
    log_z_T=jnp.zeros(T),
    values={"task": jnp.asarray(rng.integers(TASKS, size=T))},
  )
  return jnp.asarray(rng.normal(size=(T, D)), jnp.float32), routing


def build():
  """Returns the graph of SwiGLU experts and their weights, the first of which asks for the task."""
  experts = SwiGLU(F).build(Init(Keys.from_seed(0)), D, E)
  graph, state = nnx.split(experts)
  plain = nnx.to_pure_dict(state)
  bias_EKGF = jax.random.normal(jax.random.key(1), (E, TASKS, *plain["gate_up"].shape[2:]))
  return graph, {**plain, "gate_up": PerTask(plain["gate_up"], bias_EKGF)}


GRAPH, WEIGHTS = build()
X, ROUTING = draw()


def oracle(weights, x, admitted):
  """Every expert on every token, with the token's own task; then the sum of its choices."""
  pre = jnp.einsum("td,edgf->tegf", x, weights["gate_up"].base)
  pre += weights["gate_up"].bias_EKGF[:, admitted.values["task"]].swapaxes(0, 1)
  out_TED = jnp.einsum("tef,efd->ted", jax.nn.silu(pre[:, :, 0]) * pre[:, :, 1], weights["down"])
  chosen_TAD = jnp.take_along_axis(out_TED, admitted.expert_TA[:, :, None], axis=1)
  weight_TA = jnp.where(admitted.valid_TA, admitted.weight_TA, 0)
  return jnp.einsum("tad,ta->td", chosen_TAD, weight_TA)


def agree(got, right):
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MEMBERS)
def test_outputs_and_gradients_of_every_dispatcher_equal_the_dense_oracle(name):
  chooser = Chooser(names=(("grouped_matmul", "ragged"),)) if "ragged" in name else HERE
  dispatch, context = MEMBERS[name], DispatchContext(keys=Keys.from_seed(2), chooser=chooser)
  admitted, _ = dispatch.admit(ROUTING, context)

  def value(weights, x):
    y_TD, _ = dispatch(x, ROUTING, nnx.merge(GRAPH, weights), context)
    return jnp.sum(jnp.sin(y_TD)), y_TD

  def expected(weights, x):
    y_TD = oracle(weights, x, admitted)
    return jnp.sum(jnp.sin(y_TD)), y_TD

  both = [jax.jit(jax.grad(f, (0, 1), has_aux=True))(WEIGHTS, X) for f in (value, expected)]
  agree(*both)


def test_slots_of_replicated_experts_know_the_tokens_of_their_rows():
  context = DispatchContext(slots=SLOTS)
  y_TD, _ = Dropless()(X, ROUTING, nnx.merge(GRAPH, WEIGHTS), context)
  agree(y_TD, oracle(WEIGHTS, X, ROUTING))


WIDE = {"dense": Dense(), "dropless": Dropless(), "capacity": Capacity(100.0)}


@pytest.mark.parametrize("dispatch", WIDE)
@pytest.mark.parametrize("name", EXCHANGES)
def test_outputs_of_every_exchange_equal_the_dense_oracle(name, dispatch):
  axes = ("far", "near")
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), axes)
  here, group = PartitionSpec(axes), DeviceGroup(axes, (2, 2))

  def run(weights, x, routing):
    experts = nnx.merge(GRAPH, weights)
    exchange = EXCHANGES[name][1]
    return exchange(WIDE[dispatch], x, routing, experts, DispatchContext(), group)[0]

  sharded = jax.shard_map(run, mesh=mesh, in_specs=here, out_specs=here, check_vma=False)
  y_TD = jax.jit(sharded)(WEIGHTS, X, ROUTING)
  agree(np.asarray(y_TD), oracle(WEIGHTS, X, ROUTING))


def layer_of(weights):
  """Returns a layer whose experts have these weights."""
  config = MoEConfig(E, A, experts=SwiGLU(F), dispatch=Dropless())
  layer = config.build(Init(Keys.from_seed(0)), D)
  layer.experts.gate_up = nnx.Param(weights["gate_up"], dims=("expert", "embed", "gate", "mlp"))
  return layer


def test_a_layer_hands_values_of_its_tokens_to_weights_that_ask():
  layer, task_BL = layer_of(WEIGHTS), ROUTING.values["task"].reshape(2, -1)
  tokens = Tokens.of_ids(jnp.zeros(task_BL.shape, jnp.int32))
  known = dataclasses.replace(
    tokens, values={"task": task_BL, "unasked": task_BL}, return_routing=True
  )
  y_BLD, _, sums = layer(X.reshape(2, -1, D), known, None, None)
  routing = dataclasses.replace(sums.routing, values={"task": task_BL.reshape(-1)})
  agree(
    y_BLD.reshape(T, D), oracle({**WEIGHTS, "down": layer.experts.down.get_value()}, X, routing)
  )
  with pytest.raises(InputError, match="need the value 'task' of each token: give it in Tokens"):
    layer(X.reshape(2, -1, D), tokens, None, None)


def test_a_format_below_another_is_asked_too_and_plain_weights_ask_for_nothing():
  below = LowRank(WEIGHTS["gate_up"], jnp.zeros((E, D, 1)), jnp.zeros((E, 1, 2, F)), 1.0)
  assert token_values({"one": below, "other": jnp.ones(3)}) == ("task",)
  assert token_values({"one": jnp.ones(3)}) == ()
