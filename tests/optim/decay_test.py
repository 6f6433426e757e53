"""Which parameters of all families decay by default."""

import jax
import pytest

from jaxmoe.core.config_io import from_plain, to_plain
from jaxmoe.core.layout import is_dims
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import ATTENTION, BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.experts import EXPERTS
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import GATES, ROUTERS, TopK
from jaxmoe.optim import Optim, decay_mask
from jaxmoe.optim.matrices import matrix_axes

HEADS = SoftmaxAttention(num_heads=2, num_kv_heads=1, head_dim=4)
GATE = {name: TopK(gate=gate) for name, (_, gate) in GATES.items()}
RULES = {name: router for name, (_, router) in ROUTERS.items() if router.gate not in GATE.values()}
FAMILIES = {
  "gates": [BlockConfig(HEADS, MoEConfig(4, 2, router)) for router in GATE.values()],
  "routers": [
    BlockConfig(HEADS, MoEConfig(8, rule.fixed_active or 2, rule)) for rule in RULES.values()
  ],
  "experts": [BlockConfig(HEADS, MoEConfig(4, 2, experts=of)) for _, of in EXPERTS.values()],
  "attention": [BlockConfig(of, MLPConfig(8)) for _, of in ATTENTION.values()],
}


def decays(blocks, patterns):
  """Returns {name: (whether it decays, its dims)} of a decoder, buffers left out."""
  stack = (LayerGroup(tuple(blocks)),)
  decoder = Decoder(TransformerConfig(dim=8, stack=stack, norm="layer", head_bias=True), 16)
  names = jax.tree.leaves(decoder.parameter_names)
  masks = jax.tree.leaves(decay_mask(decoder.parameter_names, patterns))
  dims = jax.tree.leaves(decoder.dims, is_leaf=is_dims)
  found = dict(zip(names, zip(masks, dims, strict=True), strict=True))
  return {name: of for name, of in found.items() if "/buffers/" not in name}


def is_map(name, dims):
  """Whether a leaf multiplies what comes in."""
  return matrix_axes(name, dims) is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_what_decays_are_maps_and_no_map_but_the_embedding_is_left_out(family):
  for name, (decays_, dims) in decays(FAMILIES[family], Optim().no_decay).items():
    assert decays_ == (is_map(name, dims) and not name.startswith("embed/")), (name, dims)


def test_runs_of_before_go_on_to_decay_what_they_decayed():
  """An old config.json has the patterns in full; one written by hand may have none."""
  old = ("*scale", "*bias", "embed/*")
  assert from_plain(Optim, {}).no_decay == old
  assert from_plain(Optim, to_plain(Optim()) | {"no_decay": list(old)}).no_decay == old
  found = decays(FAMILIES["gates"] + FAMILIES["experts"], old)
  wrong = [name for name, (decays_, dims) in found.items() if decays_ and not is_map(name, dims)]
  ends = {"/".join(name.split("/")[-2:]) for name in wrong}
  assert ends == {"gate/sharpness", "local/value"}
