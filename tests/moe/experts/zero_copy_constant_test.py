import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.moe.balance import Heterogeneous
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.experts.zero_copy_constant import ZeroCopyConstant
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routing import Routing

D, F, FFN, E = 6, 4, 3, 7  # Three of the network, one zero, one copy, two constant.
ZERO, COPY = FFN, FFN + 1
EXPERTS = ZeroCopyConstant(SwiGLU(F), num_constant=2)


def run(chosen, experts=EXPERTS, weight=(0.3, 0.5)):
  """Returns x, the layer's output for tokens that all chose these experts, and the layer."""
  layer = MoEConfig(E, 2, experts=experts).build(Init(Keys.from_seed(0)), D)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, D)), jnp.float32)
  expert_TA = jnp.tile(jnp.asarray(chosen, jnp.int32), (5, 1))
  weight_TA = jnp.tile(jnp.asarray(weight, jnp.float32), (5, 1))
  routing = Routing(expert_TA, weight_TA, weight_TA > 0, jnp.ones((5, E)), jnp.zeros(5))
  found, _ = layer._experts(x[None], routing, {}, None)
  return x, found.reduce(layer.parallel)[0], layer


@pytest.mark.parametrize("order", [(ZERO, 1), (1, ZERO)])
def test_beside_a_zero_expert_an_expert_of_the_network_weighs_all(order):
  _, y, _ = run(order)
  _, alone, _ = run((1, 0), weight=(0.8, 0.0))
  np.testing.assert_allclose(y, alone, rtol=1e-6)
  weight = (0.3, 0.0) if order[0] == 1 else (0.5, 0.0)
  lost = ZeroCopyConstant(SwiGLU(F), num_constant=2, zero_gives_weight=False)
  _, kept, _ = run(order, lost)
  _, alone, _ = run((1, 0), lost, weight)
  np.testing.assert_allclose(kept, alone, rtol=1e-6)
  assert not np.allclose(kept, y)


def test_a_copy_of_weight_1_doubles_x_once_the_residual_is_added():
  x, y, _ = run((COPY, ZERO))
  np.testing.assert_allclose(x + y, x * (1 + 0.8), rtol=1e-6)
  _, y, _ = run((COPY, ZERO), weight=(0.4, 0.6))
  np.testing.assert_allclose(x + y, 2 * x, rtol=1e-6)


def test_two_experts_that_compute_nothing_take_no_row_and_drop_nothing():
  _, _, layer = run((COPY, E - 1))
  parts = layer.experts.groups(E)
  assert [(part.start, part.stop, part.takes_rows) for part in parts] == [
    (0, FFN, True), (FFN, E, False),
  ]  # fmt: skip
  assert layer._context(parts[0], None).idle == E - FFN


@pytest.mark.parametrize("tau", [0.5, 0.75])
def test_the_loss_alone_leads_to_loads_of_tau_to_one(balanced, tau):
  config = functools.partial(MoEConfig, 8, 2, experts=ZeroCopyConstant(SwiGLU(F), 1, 1, 2))
  _, loads = balanced(config(balance=(Heterogeneous(idle=tau),)), steps=1500)
  np.testing.assert_allclose(loads[:4].mean() / loads[4:].mean(), tau, rtol=0.03)


def test_a_layer_without_a_network_is_refused():
  with pytest.raises(InputError, match="must leave one of the network"):
    MoEConfig(4, 2, experts=ZeroCopyConstant(SwiGLU(F), num_constant=2))
  with pytest.raises(InputError, match="num_copy must not be negative"):
    ZeroCopyConstant(num_copy=-1)
