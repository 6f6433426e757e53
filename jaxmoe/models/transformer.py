"""The decoder: pieces over one tree of parameters, each callable alone.

A `TransformerConfig` is the record; `Decoder(record, vocab_size)` holds graph definitions and
metadata but no arrays. Parameters are nested dicts of arrays (or of other weight formats) that go
in and out as arguments: `embed`, `block` (through `Stack.run`), `final_norm` and `head` each read
theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.core.first_values import drawn_apart, drawn_together
from jaxmoe.core.init import Init
from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.core.param_names import LayerAddress, LayerGroupSizes, layer_depths
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weight_formats import dot
from jaxmoe.models.attention_experts import AttentionExperts
from jaxmoe.models.block import MLPConfig, MoEConfig
from jaxmoe.models.embedding import Embed
from jaxmoe.models.head import BiasedWeight, Head
from jaxmoe.models.layer_runs import LayerRun, keep_empty
from jaxmoe.models.param_tree import Params, dims_of, values_of
from jaxmoe.models.residual import NormKind, ResidualStream
from jaxmoe.models.stack import LayerGroup, Remat, Stack
from jaxmoe.ops.cross_entropy import BACKENDS as LOSSES
from jaxmoe.ops.cross_entropy import FORMAT, PARTS, TIED, VocabShard

Routed = MoEConfig | AttentionExperts
DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A decoder-only transformer.

  Attributes:
    dim: D, width of the stream.
    stack: Layer groups of blocks, in order of depth.
    tied: Whether the head is the embedding table.
    norm: What reads the stream: RMSNorm, or LayerNorm with a bias (Phi).
    norm_eps: Added to the mean square in every norm.
    embed_scale: What embedded tokens are multiplied by (Granite's embedding_multiplier).
    residual_scale: What is multiplied before it is added to the stream (residual_multiplier).
    logit_scale: What logits, before a bias, are multiplied by (1 / logits_scaling).
    head_bias: Whether logits have a bias (Phi).
    dtype: Of activations and products; router, softmax, norms and loss are float32 always.
    param_dtype: Of the parameters in a file. What trains is kept in `optim.master_dtype`.
    scan: Whether repeats run by `lax.scan` (one compiled body) or unrolled; same leaves.
    remat: What the backward pass recomputes: nothing, all of a pattern, or all but products.
    loss_chunk: Tokens whose logits exist at a time.
  """

  dim: int = 128
  stack: tuple[LayerGroup, ...] = (LayerGroup(),)
  tied: bool = False
  norm_eps: float = 1e-6
  dtype: DType = "float32"
  param_dtype: DType = "float32"
  scan: bool = True
  remat: Remat = "none"
  loss_chunk: int = 2048
  norm: NormKind = "rms"
  embed_scale: float = 1.0
  residual_scale: float = 1.0
  logit_scale: float = 1.0
  head_bias: bool = False

  def __post_init__(self) -> None:
    if self.dim < 1 or self.loss_chunk < 1 or self.norm_eps <= 0:
      raise InputError(
        "dim and loss_chunk must be at least 1 and norm_eps above 0: "
        f"dim={self.dim}, loss_chunk={self.loss_chunk}, norm_eps={self.norm_eps}"
      )
    if min(self.embed_scale, self.residual_scale, self.logit_scale) <= 0:
      raise InputError(
        "embed_scale, residual_scale and logit_scale must be above 0: "
        f"{self.embed_scale}, {self.residual_scale}, {self.logit_scale}"
      )
    if not self.stack:
      raise InputError("a stack needs at least one layer group")
    sizes = {layer.num_routable for layer in self.moe_records() if layer.router.gate.reads_previous}
    if len(sizes) > 1:
      raise InputError(
        "gates that add the logits of the layer before need one number of open experts in all "
        f"their layers: {sorted(sizes)}; set them alike, or give some layers another gate"
      )

  def moe_records(self) -> list[MoEConfig]:
    """Returns the record of each MoE block of each pattern, in order."""
    return [
      block.ffn
      for group in self.stack
      for block in group.pattern
      if isinstance(block.ffn, MoEConfig)
    ]

  @property
  def ffns(self) -> tuple[MLPConfig | MoEConfig, ...]:
    """The feed-forward record of each block, by depth."""
    return tuple(
      block.ffn for group in self.stack for _ in range(group.repeats) for block in group.pattern
    )

  def map_ffns(
    self, change: Callable[[MLPConfig | MoEConfig], MLPConfig | MoEConfig]
  ) -> TransformerConfig:
    """Returns the record with every feed-forward record changed."""
    stack = tuple(
      dataclasses.replace(
        group,
        pattern=tuple(dataclasses.replace(block, ffn=change(block.ffn)) for block in group.pattern),
      )
      for group in self.stack
    )
    return dataclasses.replace(self, stack=stack)

  @property
  def drop_limits(self) -> dict[int, float]:
    """The share of choices above which drops end the run, by the depth of layers that have one."""
    limits = {
      depth: ffn.drop_limit for depth, ffn in enumerate(self.ffns) if isinstance(ffn, MoEConfig)
    }
    return {depth: limit for depth, limit in limits.items() if limit < 1}

  @property
  def stream(self) -> ResidualStream:
    """What all blocks share."""
    return ResidualStream(self.dim, self.norm_eps, self.norm, self.residual_scale)

  @property
  def num_layers(self) -> int:
    """How many blocks a token passes."""
    return sum(len(group.pattern) * group.repeats for group in self.stack)

  def active_params(self) -> int:
    """Returns the parameters of all blocks' matrices that act on one token (no embedding)."""
    return sum(
      group.repeats * sum(block.active_params(self.dim) for block in group.pattern)
      for group in self.stack
    )

  def train_flops_per_token(self, vocab_size: int, seq_len: int) -> float:
    """Returns model FLOPs of forward and backward per token, as MFU counts them.

    6 per active parameter and head weight, and what attention mixes with; recomputation is not
    work.
    """
    mixing = sum(
      group.repeats * block.attention.mixing_flops(seq_len)
      for group in self.stack
      for block in group.pattern
    )
    matrices = self.active_params() + self.dim * vocab_size
    return 6.0 * matrices + mixing


class Decoder:
  """The functions of a transformer over its tree of parameters.

  Attributes:
    config: The record.
    vocab_size: V.
    parallel: What happens where arrays cross devices.
    layer_groups: How layers are grouped in memory; in order of depth unless told otherwise.
  """

  def __init__(
    self,
    config: TransformerConfig,
    vocab_size: int,
    parallel: ParallelContext = ONE_DEVICE,
    layer_groups: LayerGroupSizes | None = None,
  ):
    self.config, self.vocab_size, self.parallel = config, vocab_size, parallel
    self.dtype = jnp.dtype(config.dtype)
    of = (parallel, config.scan, config.remat, layer_groups)
    self._stack = Stack(config.stack, config.stream, *of)
    self._graphs, state = self._declared()
    self._first: Params = values_of(state)
    self.shapes: Params = jax.tree.map(lambda leaf: leaf.like, self._first)
    self.dims: Params = dims_of(state)
    self.layer_groups = self._stack.layer_groups

  def __call__(self, params: Params, ids_BL: jax.Array) -> jax.Array:
    """Returns logits (B, L, V) float32 of rows of ids, each a document of its own."""
    hidden_BLD, _, _ = self.hidden(params, Tokens.of_ids(ids_BL))
    return self.logits(params, hidden_BLD)

  def init(self, keys: Keys, spread: bool = False) -> Params:
    """Returns fresh parameters; each depends on the seed, its name and its layer's depth.

    Args:
      keys: Of all draws.
      spread: Whether they are to lie on several devices, of which each draws its part; the bits are
        the same.
    """
    leaves, tree = jax.tree.flatten(self._first)
    draw = drawn_apart if spread else drawn_together
    return jax.tree.unflatten(tree, jax.jit(lambda keys: draw(keys, leaves))(keys))

  @property
  def parameter_names(self) -> Params:
    """A tree like the parameters of their canonical names (a stacked leaf: its first layer's)."""
    flat = param_names.flatten(self.shapes)
    return param_names.unflatten(
      self.shapes, {path: param_names.canonical_name(path, self.layer_groups) for path in flat}
    )

  @property
  def num_params(self) -> int:
    """The number of parameters."""
    return param_names.num_entries(param_names.flatten(self.shapes), self.layer_groups)

  def moe_layers(self) -> dict[str, dict[str, MoEConfig]]:
    """Returns the record of each MoE block, by layer group and position of its pattern."""
    return {
      str(s): {
        str(j): block.ffn
        for j, block in enumerate(group.pattern)
        if isinstance(block.ffn, MoEConfig)
      }
      for s, group in enumerate(self.config.stack)
    }

  def routed_layers(self) -> dict[str, dict[str, Routed]]:
    """Returns the record of each part with a router, by group and position as sums have it."""
    return {
      str(s): {
        LayerAddress(str(s), str(j), part).place: layer
        for j, block in enumerate(group.pattern)
        for part, layer in ((param_names.MOE, block.ffn), (param_names.ATTENTION, block.attention))
        if isinstance(layer, (MoEConfig, AttentionExperts))
      }
      for s, group in enumerate(self.config.stack)
    }

  @property
  def tree_paths(self) -> list[str]:
    """The path of each gate whose decisions can be compared by domain."""
    return [
      LayerAddress.parse(s, place).gate_path
      for s, places in self.routed_layers().items()
      for place, layer in places.items()
      if layer.router.gate.decides
    ]

  def embed(self, params: Params, ids_BL: jax.Array) -> jax.Array:
    """Returns (B, L, D) in the model's dtype; NaN for an id outside the vocabulary."""
    with jax.named_scope("embed"):
      table = params["embed"]["table"]
      x_BLD = self.parallel.embed(table, ids_BL, self.dtype, self.vocab_size)
      scale = self.config.embed_scale
      return x_BLD if scale == 1 else x_BLD * scale

  def blocks(
    self,
    params: Params,
    x_BLD: jax.Array,
    tokens: Tokens,
    caches: Any = None,
    keys: Keys | None = None,
  ) -> tuple[jax.Array, Any, Any]:
    """Runs every block; see `Stack.run`."""
    state = (x_BLD, self.first_logits(tokens))
    return self._stack.run(self._graphs["stack"], params["stack"], state, tokens, caches, keys)

  def apart(self, params: Params) -> Params:
    """Returns the parameters with those of each layer in arrays of their own, as decoding has them.

    `hidden` takes them beside caches that are `caches_apart`.
    """
    return {**params, "stack": self._stack.apart(params["stack"])}

  def caches_apart(self, batch: int, slots: int) -> Any:
    """Returns empty caches for every block, each in arrays of its own."""
    return self._stack.apart(self.empty_caches(batch, slots))

  def run_layers(
    self, run: LayerRun, weights: Params, handed: tuple[jax.Array, Any], tokens: Tokens,
    keys: Keys | None = None,
  ) -> tuple[tuple[jax.Array, Any], dict[str, Any]]:
    """Returns what the layer after a run of layers is handed, and MoE sums by place.

    `weights` are what `LayerRun.take` cuts out of `params["stack"]`; `handed` is the stream,
    (B, L, D), and the logits that gates hand on.
    """
    graphs = {j: self._graphs["stack"][run.group][j] for j in run.positions}
    group = (run.group, graphs, run.depth)
    handed, (_, sums) = self._stack.run_group(group, weights, handed, tokens, None, keys)
    return handed, sums

  def update_buffers(self, before: Params, params: Params, layers: Any, statistics: Any) -> Params:
    """Returns the parameters with what routers keep from step to step brought up to date.

    Args:
      before: The parameters of the step that `layers` came from; their buffers are moved.
      params: These parameters as the optimizer has moved them.
      layers: `MoESums` of the whole step, by layer group and position, stacked over repeats.
      statistics: What routers keep of each token, likewise; None where they keep nothing.
    """
    stack = params["stack"]
    for s, places in self.routed_layers().items():
      for place, layer in places.items():
        _, j, part = LayerAddress.parse(s, place)
        buffers = before["stack"][s][j][part]["router"].get("buffers")
        if not buffers:
          continue
        sums, routed = layers[s][place].router, stack[s][j][part]
        moved = jax.vmap(layer.router.update)(buffers, sums, statistics[s][place])
        moved = keep_empty(layer_depths(int(s), int(j), self.layer_groups), moved, buffers)
        routed = {**routed, "router": {**routed["router"], "buffers": moved}}
        stack = {**stack, s: {**stack[s], j: {**stack[s][j], part: routed}}}
    return {**params, "stack": stack}

  def final_norm(self, params: Params, x_BLD: jax.Array) -> jax.Array:
    """Returns (B, L, D) in x.dtype."""
    with jax.named_scope("final_norm"):
      return nnx.merge(self._graphs["final_norm"], params["final_norm"])(x_BLD)

  def head(self, params: Params) -> tuple[Any, str]:
    """Returns the head's weight and the einsum that makes logits of rows with it.

    `logit_scale` is not in it: rows are multiplied by it.
    """
    if self.config.tied:
      weight, spec = params["embed"]["table"], "td,vd->tv"
    else:
      weight, spec = params["head"]["weight"], "td,dv->tv"
    return (BiasedWeight(weight, params["head"]["bias"]) if self.config.head_bias else weight), spec

  def hidden(
    self, params: Params, tokens: Tokens, caches: Any = None, keys: Keys | None = None
  ) -> tuple[jax.Array, Any, Any]:
    """Returns the normalised stream (B, L, D), the caches and the MoE sums."""
    x_BLD = self.embed(params, tokens.id)
    x_BLD, caches, sums = self.blocks(params, x_BLD, tokens, caches, keys)
    return self.final_norm(params, x_BLD), caches, sums

  def logits(self, params: Params, hidden_BLD: jax.Array) -> jax.Array:
    """Returns (B, L, V) float32."""
    weight, spec = self.head(params)
    hidden_TD = self._scaled(hidden_BLD.reshape(-1, hidden_BLD.shape[-1]))
    logits_TV = dot(weight, hidden_TD.astype(jnp.float32), spec)
    return logits_TV.reshape(*hidden_BLD.shape[:2], -1)

  def nll(
    self, params: Params, hidden_BLD: jax.Array, labels_BL: jax.Array, chunk: int | None = None
  ) -> jax.Array:
    """Returns (B, L) float32 nats, 0 where the label is negative; never holds (B, L, V).

    Args:
      params: Those of the head.
      hidden_BLD: The normalised stream.
      labels_BL: The right ids.
      chunk: Tokens whose logits exist at a time; None for what the model has.
    """
    weight, spec = self.head(params)
    hidden_TD = self._scaled(
      self.parallel.all_gather_sequence(hidden_BLD).reshape(-1, hidden_BLD.shape[-1])
    )
    part = (
      VocabShard(self.parallel.vocab_axis, self.vocab_size) if self.parallel.vocab_axis else None
    )
    chunk = chunk or self.config.loss_chunk
    sizes = {"T": hidden_TD.shape[0], "D": hidden_TD.shape[1], "C": chunk}
    asked = {
      PARTS: part is not None, TIED: self.config.tied, FORMAT: not isinstance(weight, jax.Array)
    }  # fmt: skip
    features = [name for name, wanted in asked.items() if wanted]
    loss = self.parallel.chooser.choose("cross_entropy", LOSSES, hidden_TD.dtype, sizes, features)
    nll_T, _ = loss(hidden_TD, weight, spec, labels_BL.reshape(-1), chunk, part)
    return nll_T.reshape(labels_BL.shape)

  def _scaled(self, hidden_TD: jax.Array) -> jax.Array:
    """Returns the rows whose logits come out scaled; float32 where they do."""
    scale = self.config.logit_scale
    return hidden_TD if scale == 1 else hidden_TD.astype(jnp.float32) * scale

  def empty_caches(self, batch: int, slots: int) -> Any:
    """Returns empty caches for every block, stacked over repeats."""
    return self._stack.empty_caches(batch, slots, self.dtype)

  def first_logits(self, tokens: Tokens) -> Any:
    """Returns what the gates of the first layer are handed: zero logits if gates carry any."""
    for layer in self.config.moe_records():
      if layer.router.gate.reads_previous:
        return jnp.zeros((tokens.id.size, layer.num_routable), jnp.float32)
    return None

  def _declared(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns graph definitions and what is declared of each leaf; no array is made."""
    config = self.config
    init = Init.declaring(jnp.dtype(config.param_dtype), config.num_layers)
    norm, norm_state = nnx.split(config.stream.make_norm(init / "final_norm"))
    graphs, stack = self._stack.declared(init)
    embed = Embed(init / "embed", self.vocab_size, config.dim, config.tied)
    tree = {"embed": nnx.state(embed), "stack": stack, "final_norm": norm_state}
    if not config.tied or config.head_bias:
      of = (self.vocab_size, config.dim, config.tied, config.head_bias)
      tree["head"] = nnx.state(Head(init / "head", *of))
    return {"final_norm": norm, "stack": graphs}, tree
