import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.balance import LoadBalance, NullAveraged
from jaxmoe.moe.dispatch import Capacity, Dropless
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.experts.null import Null
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK

D, F, N, M, A, T = 6, 4, 4, 4, 3, 29


def run(config, x, state=None, segment=None):
  """Returns outputs, sums, state and the gradients of parameters and x of a layer."""
  layer = config.build(Init(Keys.from_seed(0)), D)
  graph = nnx.graphdef(layer)
  state = nnx.to_pure_dict(nnx.state(layer)) if state is None else state
  slot = jnp.arange(T, dtype=jnp.int32)[None]
  segment = jnp.ones_like(slot) if segment is None else segment
  tokens = Tokens(slot, slot, segment, slot, return_routing=True)

  def call(state, x):
    y, _, sums = nnx.merge(graph, state)(x[None], tokens, None, None)
    return jnp.sum(y**2), (y[0], sums)

  grads, (y, sums) = jax.jit(jax.grad(call, argnums=(0, 1), has_aux=True))(state, x)
  return y, sums, state, grads


def draw():
  return jnp.asarray(np.random.default_rng(0).normal(size=(T, D)), jnp.float32)


def test_without_null_experts_it_is_the_network_alone_bit_for_bit():
  x = draw()
  y, sums, state, grads = run(MoEConfig(N, A, experts=Null(SwiGLU(F), num_null=0)), x)
  bare = {"router": state["router"], "experts": state["experts"]["kinds"]["true"]}
  right, right_sums, _, right_grads = run(MoEConfig(N, A, experts=SwiGLU(F)), x, bare)
  np.testing.assert_array_equal(y, right)
  jax.tree.map(np.testing.assert_array_equal, sums, right_sums)
  np.testing.assert_array_equal(grads[1], right_grads[1])
  np.testing.assert_array_equal(
    grads[0]["router"]["gate"]["weight"], right_grads[0]["router"]["gate"]["weight"]
  )


def layer_of(**options):
  return MoEConfig(N + M, A, experts=Null(SwiGLU(F), num_null=M), **options)


def moved(state, order):
  """Returns the state with the columns of the router in another order."""
  weight = state["router"]["gate"]["weight"][:, np.asarray(order)]
  return {**state, "router": {**state["router"], "gate": {"weight": weight}}}


def test_a_permutation_of_null_columns_changes_nothing():
  x = draw()
  y, _, state, grads = run(layer_of(), x)
  order = [*range(N), *(N + np.random.default_rng(1).permutation(M))]
  again, _, _, again_grads = run(layer_of(), x, moved(state, order))
  # The softmax adds up in another order.
  np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(again_grads[1], grads[1], rtol=1e-4, atol=1e-5)


def test_a_token_of_null_experts_alone_gets_exact_zeros_and_finite_gradients():
  x = draw().at[:, 0].set(9.0)
  _, _, state, _ = run(layer_of(), x)
  weight = state["router"]["gate"]["weight"].at[0].set(jnp.where(jnp.arange(N + M) < N, -9, 9.0))
  state = {**state, "router": {**state["router"], "gate": {"weight": weight}}}
  y, sums, _, grads = run(layer_of(), x, state)
  np.testing.assert_array_equal(y, 0)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  assert sums.idle == T * A


@pytest.mark.parametrize("dispatch", [Dropless(), Capacity(factor=100.0)])
def test_rows_and_metrics_fall_exactly_with_the_choices_that_compute(dispatch):
  x = draw()
  segment = jnp.ones((1, T), jnp.int32).at[0, -5:].set(0)
  config = layer_of(dispatch=dispatch)
  _, sums, _, _ = run(config, x, segment=segment)
  routing = sums.routing
  true_TA = np.asarray(routing.valid_TA) & (np.asarray(routing.expert_TA) < N)
  plan = dispatch.plan(routing.part(0, N))
  np.testing.assert_array_equal(
    plan.groups.sizes_S, np.bincount(np.asarray(routing.expert_TA)[true_TA], minlength=N)
  )
  assert np.sum(plan.groups.sizes_S) == true_TA.sum() < A * (T - 5)
  assert float(sums.router.counts_E.sum() - sums.idle) == true_TA.sum()
  assert sums.router.counts_E.shape == (N + M,), "null columns are columns of the router"


def test_the_weights_of_the_others_sum_to_the_scale_whatever_the_nulls():
  router = TopK(scale=2.5)
  config = layer_of(router=router)
  _, sums, _, _ = run(config, draw())
  layer = config.build(Init(Keys.from_seed(0)), D)
  weighed = layer.experts.adjust_weights(sums.routing)
  true_TA, weight_TA = np.asarray(weighed.expert_TA) < N, np.asarray(weighed.weight_TA)
  some_T = true_TA.any(axis=1)
  np.testing.assert_allclose(np.sum(weight_TA * true_TA, axis=1)[some_T], 2.5, rtol=1e-6)
  assert (some_T & ~true_TA.all(axis=1)).any(), "no token has both"


def variation(loads):
  return loads.std() / loads.mean()


def test_the_loss_alone_leads_to_a_n_over_n_plus_m_experts_each_token_its_own_number(balanced):
  n, m, k = 8, 8, 4
  layer = functools.partial(MoEConfig, n + m, k, experts=Null(SwiGLU(F), num_null=m))
  expert_TA, loads = balanced(layer(balance=(NullAveraged(),)))
  np.testing.assert_allclose(loads[:n].sum() / loads.sum() * k, k * n / (n + m), rtol=0.01)
  spread = np.bincount((expert_TA < n).sum(1), minlength=k + 1) / len(expert_TA)
  assert spread.max() < 0.6 and (spread > 0.005).sum() >= 4, spread
  _, plain = balanced(layer(balance=(LoadBalance(),)))
  np.testing.assert_allclose(plain[:n].sum() / plain.sum() * k, k * n / (n + m), rtol=0.01)
  # Averaged nulls are free among themselves; plain balance makes them alike.
  assert variation(loads[n:]) > 0.1 > 0.03 > variation(plain[n:])
  assert variation(loads[:n]) < 0.03


def test_capacity_is_sized_by_the_share_of_choices_that_compute():
  config = layer_of(dispatch=Capacity(factor=1.0))
  layer = config.build(Init(Keys.from_seed(0)), D)
  (part,) = layer.experts.groups(N + M)
  _, sums, _, _ = run(config, draw())
  rows = config.dispatch.rows_for(sums.routing.part(0, N), layer._context(part, None))
  assert rows == -(-T * A // (N + M))


def test_a_layer_of_nulls_alone_is_refused():
  with pytest.raises(InputError, match="must leave an expert that computes"):
    MoEConfig(4, 2, experts=Null(SwiGLU(F), num_null=4))
  with pytest.raises(InputError, match="must not be negative"):
    Null(SwiGLU(F), num_null=-1)
  with pytest.raises(InputError, match="cannot be inactive"):
    MoEConfig(8, 2, experts=Null(SwiGLU(F), num_null=2), num_inactive=1)
