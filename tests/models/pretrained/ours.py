"""What jaxmoe makes of a checkpoint that transformers wrote."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core import param_names
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.generate import Sampling, generate
from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.models.pretrained.checkpoint import open_checkpoint
from jaxmoe.models.pretrained.tensor_mapping import choose_layouts
from jaxmoe.models.transformer import Decoder
from jaxmoe.moe.dispatch import DISPATCHERS
from jaxmoe.moe.layer import MoEConfig

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
CLOSE = {"atol": 2e-4, "rtol": 1e-4}
"""Of float32 logits. Transformers itself is up to 6e-5 from its float64 at such weights."""


class Ours:
  """A checkpoint, its decoder and parameters."""

  def __init__(self, folder):
    self.checkpoint = open_checkpoint(FAMILIES, folder)
    self.decoder = self.checkpoint.decoder
    named = {bound.name: self.checkpoint.gather(bound, layout)
             for bound, layout in self.checkpoint.weights}  # fmt: skip
    self.params = self.tree(named)

  def with_dispatch(self, name):
    """Has every MoE layer use another dispatcher: `dense` compiles fastest."""
    dispatch = DISPATCHERS[name][1]

    def change(ffn):
      return dataclasses.replace(ffn, dispatch=dispatch) if isinstance(ffn, MoEConfig) else ffn

    model = self.checkpoint.model.map_ffns(change)
    self.decoder = Decoder(model, self.checkpoint.vocab_size)
    return self

  def tree(self, named):
    """Our tree of arrays by canonical name."""
    arrays = {name: jnp.asarray(x) for name, x in named.items()}
    flat = param_names.stack(
      arrays, list(param_names.flatten(self.decoder.shapes)), self.decoder.layer_groups
    )
    return param_names.unflatten(self.decoder.shapes, flat)

  def forward(self, ids_BL, position_BL=None):
    """Logits, choices by depth (sorted) and the gradients of the mean loss by canonical name."""
    tokens = dataclasses.replace(Tokens.of_ids(jnp.asarray(ids_BL)), return_routing=True)
    if position_BL is not None:
      tokens = dataclasses.replace(tokens, position=jnp.asarray(position_BL, jnp.int32))
    with jax.default_matmul_precision("highest"):
      (_, (logits, sums)), grads = forward(self.decoder, self.params, tokens)
    layers = param_names.by_layer(sums, self.decoder.layer_groups)
    choices = {
      depth: np.sort(np.asarray(of.routing.expert_TA), axis=1) for depth, of in layers.items()
    }
    return (
      np.asarray(logits),
      choices,
      param_names.unstack(param_names.flatten(grads), self.decoder.layer_groups),
    )

  def greedy(self, ids_BL, new):
    with jax.default_matmul_precision("highest"):
      rows = generate(
        self.decoder, self.params, list(ids_BL), Sampling(max_tokens=new, temperature=0),
        (ids_BL.shape[1] + new + 1, -1),
      )  # fmt: skip
    return np.array(rows)

  def from_theirs(self, gradients):
    """Gradients in transformers' names by our canonical names; linear, as weights are."""
    bound = [one for one, _ in self.checkpoint.weights if "/buffers/" not in one.name]
    return {
      one.name: one.gather(layout, gradients.__getitem__)
      for one, layout in choose_layouts(bound, gradients)
    }


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def forward(decoder, params, tokens):
  def loss(params):
    hidden, _, sums = decoder.hidden(params, tokens)
    labels = jnp.pad(tokens.id[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    nll = decoder.nll(params, hidden, labels)
    return jnp.sum(nll) / jnp.sum(labels >= 0), (decoder.logits(params, hidden), sums)

  return jax.value_and_grad(loss, has_aux=True)(params)


def check_forward(ours, ids, logits, choices, position=None):
  """Asserts equal logits and routing; returns our gradients."""
  got, routed, grads = ours.forward(ids, position)
  np.testing.assert_allclose(got, logits, **CLOSE)
  assert routed.keys() == choices.keys()
  for depth, chosen in choices.items():
    np.testing.assert_array_equal(routed[depth], chosen, err_msg=f"layer {depth}")
  return grads


def check_gradients(ours, grads, theirs):
  """Asserts that each leaf is within 1e-4 of its norm, and 1e-7 of that of all."""
  wanted = ours.from_theirs(theirs)
  whole = np.sqrt(sum(float(np.square(x, dtype=np.float64).sum()) for x in wanted.values()))
  for name, want in wanted.items():
    off = np.linalg.norm(np.float64(grads[name]) - want)
    assert off <= 1e-4 * np.linalg.norm(want) + 1e-7 * whole, (name, off, np.linalg.norm(want))


def check_greedy(ours, prompt, written, margin):
  """Asserts equal text up to the first near tie of a row; ties are few."""
  got = ours.greedy(prompt, written.shape[1])
  sure = np.cumprod(margin > 1e-3, axis=1).astype(bool)
  assert sure.mean() >= 0.95
  np.testing.assert_array_equal(got[sure], written[sure])
