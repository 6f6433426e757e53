import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.dispatch import Capacity, Dense, Dropless
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers.topk import GShard, Switch

T, D, E = 40, 6, 4


def test_the_weight_of_an_only_expert_is_never_divided_by_itself():
  with pytest.raises(InputError, match="normalize=True; set normalize=false"):
    Switch(normalize=True)


@pytest.mark.parametrize("jitter", [-0.1, 1.0])
def test_jitter_that_may_turn_a_sign_is_refused(jitter):
  with pytest.raises(InputError, match="jitter must lie between 0 and 1"):
    Switch(jitter=jitter)


def test_a_rule_that_knows_one_number_of_experts_refuses_others():
  with pytest.raises(InputError, match="GShard sends a token to 2: num_active=3; set num_active=2"):
    MoEConfig(num_experts=4, num_active=3, router=GShard())


def test_jitter_multiplies_each_entry_of_the_gate_input_within_its_bounds_in_training_alone():
  x, keys = jnp.ones((500, D), jnp.bfloat16), Keys.from_seed(0)
  tokens = Tokens.of_ids(jnp.zeros((5, 100), jnp.int32))
  factor = np.asarray(Switch(jitter=0.25).gate_input(x, tokens, keys))
  assert factor.dtype == np.float32
  assert 0.75 <= factor.min() < 0.76 and 1.24 < factor.max() <= 1.25
  np.testing.assert_allclose(factor.mean(0), 1, atol=4 * 0.25 / np.sqrt(3 * 500))
  assert Switch(jitter=0.25).gate_input(x, tokens, None) is x
  assert Switch().gate_input(x, tokens, keys) is x


@pytest.mark.parametrize("second", [0.02, 0.5, 0.98])
def test_gshard_keeps_a_second_expert_with_probability_2_g2_and_the_first_always(seen_of, second):
  share, num = second / (1 + second), 20_000
  logits = np.log(np.tile([1.0, second, 1e-6], (num, 1)))
  chosen = GShard().select(seen_of(GShard(), logits))
  assert chosen.valid_TA[:, 0].all()
  kept, p = np.mean(chosen.valid_TA[:, 1]), 2 * share
  assert abs(kept - p) < 4 * np.sqrt(p * (1 - p) / num)
  np.testing.assert_allclose(chosen.weight_TA, [[1 - share, share]] * num, rtol=1e-5)
  assert GShard().select(seen_of(GShard(), logits, seed=None)).valid_TA is None


@pytest.mark.parametrize("dispatch", [Dropless(), Dense(), Capacity(100.0)], ids=str)
def test_a_choice_that_is_not_kept_adds_nothing_and_has_no_gradient(dispatch):
  config = MoEConfig(E, 2, router=GShard(), experts=SwiGLU(4), dispatch=dispatch)
  layer = config.build(Init(Keys.from_seed(0)), D)
  x = jax.random.normal(jax.random.key(1), (T, D))
  tokens = Tokens.of_ids(jnp.zeros((1, T), jnp.int32))
  routing, _ = layer.router(x, tokens, None, Keys.from_seed(2))
  assert 0 < routing.valid_TA[:, 1].sum() < T
  all_valid = dataclasses.replace(
    routing,
    weight_TA=jnp.where(routing.valid_TA, routing.weight_TA, 0),
    valid_TA=jnp.ones_like(routing.valid_TA),
  )
  graph, state = nnx.split(layer.experts)

  @jax.jit
  def run(routing):
    def value(weight_TA):
      moved = dataclasses.replace(routing, weight_TA=weight_TA)
      return dispatch(x, moved, nnx.merge(graph, state))[0]

    y, vjp = jax.vjp(value, routing.weight_TA)
    return y, vjp(jnp.ones_like(y))[0]

  (y, grads), (right, right_grads) = run(routing), run(all_valid)
  np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-6)
  kept = np.asarray(routing.valid_TA)
  np.testing.assert_array_equal(np.asarray(grads)[~kept], 0)
  np.testing.assert_allclose(np.asarray(grads)[kept], right_grads[kept], rtol=1e-4, atol=1e-5)
