"""Mixture-of-Experts layers as ordinary flax.nnx modules, for anybody's nnx model.

    from flax import nnx
    import jaxmoe

    config = jaxmoe.MoEConfig(num_experts=8, num_active=2)
    moe = jaxmoe.nn.MoE(config, dim=512, rngs=nnx.Rngs(0))
    y, aux = moe(x)              # x is (B, L, 512) or (T, 512)
    loss = task_loss(y) + aux.loss
    moe.update_router(aux)       # after a step, where a router keeps a bias

Each module is a thin one over the code that `jaxmoe.train` runs. Weights are `nnx.Param`, what a
router moves by rules of its own is a `RouterBuffer`: an optimizer of `wrt=nnx.Param` leaves it.

aux.py                 what a module tells beside its output
tokens.py              records of tokens for anybody's arrays
moe_module.py          a layer of experts
router_module.py       a router alone
attention_module.py    attention of any kind
block_module.py        attention and a feed-forward part, with norms and residuals
transformer_module.py  a whole language model
partition.py           weights over a mesh, by their dims
"""

from jaxmoe.nn.attention_module import Attention
from jaxmoe.nn.aux import Aux, ModelAux
from jaxmoe.nn.block_module import Block
from jaxmoe.nn.moe_module import MoE
from jaxmoe.nn.partition import shard
from jaxmoe.nn.router_module import Router, RouterBuffer
from jaxmoe.nn.transformer_module import Transformer

__all__ = [
  "Attention",
  "Aux",
  "Block",
  "MoE",
  "ModelAux",
  "Router",
  "RouterBuffer",
  "Transformer",
  "shard",
]
