"""A whole Mixture-of-Experts language model as a flax.nnx module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.param_names import LayerAddress, layer_names
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.transformer import Decoder, Params, TransformerConfig
from jaxmoe.nn.aux import ModelAux, aux_of, joined
from jaxmoe.nn.router_module import RouterBuffer
from jaxmoe.nn.tokens import keys_of, tokens_of


class Transformer(nnx.Module):
  """A decoder-only language model.

      config = jaxmoe.TransformerConfig(dim=64)
      model = jaxmoe.nn.Transformer(config, vocab_size=256, rngs=nnx.Rngs(0))
      logits, aux = model(ids)  # (B, L, V)
      loss = cross_entropy(logits, labels) + aux.loss

  Attributes:
    config: Its record.
    weights: All parameters, as the decoder has them; repeats of a pattern are stacked.
  """

  def __init__(self, config: TransformerConfig, vocab_size: int, *, rngs: nnx.Rngs):
    self.config, self.vocab_size = config, vocab_size
    decoder = Decoder(config, vocab_size)
    self.weights = _variables(decoder.init(Keys(rngs.params())), decoder.dims)

  @property
  def params(self) -> Params:
    """The parameters as nested dicts of arrays, as `Decoder` takes them."""
    return nnx.to_pure_dict(nnx.state(self.weights))

  def __call__(
    self, ids: jax.Array, segment: jax.Array | None = None, rngs: nnx.Rngs | None = None
  ) -> tuple[jax.Array, ModelAux]:
    """Returns logits (B, L, V) float32, and what layers of experts tell, by name.

    Args:
      ids: int32 (B, L).
      segment: (B, L), see `tokens_of`: documents do not see each other.
      rngs: Randomness of routers that draw (`rngs.router()`); None for none.
    """
    decoder, params = Decoder(self.config, self.vocab_size), self.params
    places = tokens_of(ids.shape, segment)
    tokens = Tokens(ids, places.position, places.segment, places.slot, return_routing=True)
    keys = keys_of(None if rngs is None else rngs.router())
    hidden_BLD, _, sums = decoder.hidden(params, tokens, keys=keys)
    layers = {}
    for address, names in _addresses(decoder):
      record = decoder.routed_layers()[address.group][address.place]
      for repeat, name in enumerate(names):
        of_layer = jax.tree.map(lambda leaf, r=repeat: leaf[r], sums[address.group][address.place])
        layers[name] = aux_of(record, of_layer, tokens)
    return decoder.logits(params, hidden_BLD), joined(layers)

  def update_router(self, aux: ModelAux) -> None:
    """Moves what routers keep from step to step, in place."""
    decoder, params = Decoder(self.config, self.vocab_size), self.params
    sums: dict[str, dict[str, Any]] = {}
    for address, layers in _addresses(decoder):
      several = [aux.layers[name].sums for name in layers]
      stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
      sums.setdefault(address.group, {})[address.place] = stacked
    statistics = {s: {place: of.statistics for place, of in at.items()} for s, at in sums.items()}
    state = nnx.state(self.weights)
    nnx.replace_by_pure_dict(state, decoder.update_buffers(params, params, sums, statistics))
    nnx.update(self.weights, state)


def _addresses(decoder: Decoder) -> Iterator[tuple[LayerAddress, list[str]]]:
  """Yields the address of every part with a router, and the name it has in each repeat."""
  for s, places in decoder.routed_layers().items():
    for place in places:
      address = LayerAddress.parse(s, place)
      names = layer_names(address.path, decoder.layer_groups)
      assert names is not None
      yield address, names


def _variables(params: Params, dims: Params, kind: type = nnx.Param) -> Any:
  """Returns nested dicts of arrays as variables; a router's buffers are no `nnx.Param`."""
  if not isinstance(params, dict):
    return kind(params, dims=dims)
  return nnx.Dict(
    {
      name: _variables(child, dims[name], RouterBuffer if name == "buffers" else kind)
      for name, child in params.items()
    }
  )
