"""Routers and experts beside those of transformers, with the same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.experts.clamped_swiglu import ClampedSwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.bias import AuxFree
from jaxmoe.moe.routers.gates import LinearGateConfig

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

D, T, E = 10, 40, 8


@functools.cache
def drawn(record, *sizes):
  """Returns a module and its leaves, none of them zero."""
  module = record.build(Init(Keys.from_seed(1)), *sizes)
  rng = np.random.default_rng(2)
  move = lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) * 0.3  # noqa: E731
  state = jax.tree.map(lambda leaf: jnp.asarray(move(np.asarray(leaf))), nnx.state(module))
  return nnx.merge(nnx.graphdef(module), state)


def draw():
  return np.random.default_rng(3).normal(size=(T, D)).astype(np.float32) * 2


def tokens():
  return Tokens.of_ids(jnp.zeros((1, T), jnp.int32))


def tensor(leaf):
  return torch.tensor(np.array(leaf.get_value()))


def by_expert(expert, weight):
  """Returns (T, E): what each token multiplies each expert by."""
  table = np.zeros((T, E))
  np.put_along_axis(table, np.asarray(expert), np.asarray(weight, np.float64), axis=1)
  return table


GROUPS = {"num_groups": 4, "groups_active": 2}
ROUTERS = {
  "DeepSeek-V3": AuxFree(scale=2.5, **GROUPS),
  "DeepSeek-V3, scores as weights": AuxFree(normalize=False, **GROUPS),
  "DeepSeek-V2": AuxFree(
    score="softmax", normalize=False, scale=16.0, bias_rate=0.0, group_best=1, **GROUPS
  ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_limited_groups_choose_and_weigh_as_deepseek(name):
  router, active = ROUTERS[name], 3
  module = drawn(router, D, E, active)
  x, is_v3 = draw(), router.score == "sigmoid"
  if is_v3:
    from transformers import DeepseekV3Config as Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter as Router
  else:
    from transformers import DeepseekV2Config as Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter as Router

    module.buffers["bias"].set_value(jnp.zeros(E))
  of = Config(
    hidden_size=D, n_routed_experts=E, num_experts_per_tok=active, n_group=4, topk_group=2,
    norm_topk_prob=router.normalize, routed_scaling_factor=router.scale,
    topk_method="group_limited_greedy", moe_intermediate_size=8, num_attention_heads=2,
  )  # fmt: skip
  theirs = Router(of)
  with torch.no_grad():
    theirs.weight.copy_(tensor(module.gate.weight).T)
    if is_v3:
      theirs.e_score_correction_bias.copy_(tensor(module.buffers["bias"]))
    _, weight, expert = theirs(torch.tensor(x)[None])
  routing, _ = module(jnp.asarray(x), tokens(), None, None)
  right = by_expert(expert.reshape(T, -1).numpy(), weight.reshape(T, -1).numpy())
  found = by_expert(routing.expert_TA, routing.weight_TA)
  np.testing.assert_array_equal(found > 0, right > 0)
  np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)
  # The bias and the groups count: the best scores alone are others.
  plain = np.argsort(-np.asarray(routing.scores_TE), axis=1)[:, :active]
  assert (np.sort(plain) != np.sort(routing.expert_TA)).any(axis=1).mean() > 0.2


def test_a_layer_of_clamped_experts_behind_a_gate_with_a_bias_is_that_of_gpt_oss():
  from transformers import GptOssConfig
  from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

  hidden, limit = 6, 1.0
  layer = MoEConfig(
    E, 3, TopK(gate=LinearGateConfig(bias=True)), ClampedSwiGLU(hidden, limit=limit)
  )
  module = drawn(layer, D)
  of = GptOssConfig(
    hidden_size=D, intermediate_size=hidden, num_local_experts=E, num_experts_per_tok=3,
    swiglu_limit=limit, experts_implementation="eager", num_hidden_layers=1,
  )  # fmt: skip
  theirs = GptOssMLP(of)
  experts, gate = module.experts, module.router.gate
  # Theirs lie in turn: gate, up, gate, up.
  in_turn = lambda leaf: tensor(leaf).transpose(-1, -2).flatten(-2)  # noqa: E731
  with torch.no_grad():
    theirs.router.weight.copy_(tensor(gate.weight).T)
    theirs.router.bias.copy_(tensor(gate.bias))
    theirs.experts.gate_up_proj.copy_(in_turn(experts.gate_up))
    theirs.experts.gate_up_proj_bias.copy_(in_turn(experts.gate_up_bias))
    theirs.experts.down_proj.copy_(tensor(experts.down))
    theirs.experts.down_proj_bias.copy_(tensor(experts.down_bias))
    right = theirs(torch.tensor(draw())[None])[0].numpy()
  found = np.asarray(module(jnp.asarray(draw())[None], tokens(), None, None)[0])
  assert right.std() > 0.3
  np.testing.assert_allclose(found, right, rtol=1e-4, atol=2e-5)
