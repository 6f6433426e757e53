"""One block: x + attention(norm(x)), then x + ffn(norm(x)); the ffn is dense or a MoE."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxmoe.core.config_io import choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.core.renamed import renamed
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.attention_experts import HEADS, AttentionExperts
from jaxmoe.models.binary_linear_attention import BinaryLinear
from jaxmoe.models.cache import Cache
from jaxmoe.models.latent_attention import LatentAttention
from jaxmoe.models.residual import ResidualStream
from jaxmoe.models.rope_scaling import Yarn
from jaxmoe.models.stick_breaking_attention import StickBreaking
from jaxmoe.moe.experts.swiglu import SwiGLUMLP
from jaxmoe.moe.layer import MoEConfig, MoESums


@dataclasses.dataclass(frozen=True)
class MLPConfig:
  """A dense SwiGLU feed-forward layer of width `mlp_dim`."""

  mlp_dim: int = renamed("hidden", 512)

  def __post_init__(self) -> None:
    if self.mlp_dim < 1:
      raise InputError(f"mlp_dim must be at least 1: mlp_dim={self.mlp_dim}")

  def active_params(self, dim: int) -> int:
    """Returns how many parameters act on one token."""
    return 3 * dim * self.mlp_dim


ATTENTION = {
  "softmax": (SoftmaxAttention, SoftmaxAttention(num_heads=2, num_kv_heads=1, head_dim=16)),
  "sinks": (
    SoftmaxAttention,
    SoftmaxAttention(
      num_heads=2,
      num_kv_heads=1,
      head_dim=16,
      bias="all",
      clip=4.0,
      scale=0.2,
      sinks=True,
      rope=Yarn(original=64),
    ),
  ),
  "qk_norm": (
    SoftmaxAttention,
    SoftmaxAttention(num_heads=2, num_kv_heads=1, head_dim=16, qk_norm="all"),
  ),
  "stick_breaking": (StickBreaking, StickBreaking(num_heads=2, num_kv_heads=1, head_dim=16)),
  "latent": (
    LatentAttention,
    LatentAttention(
      num_heads=2,
      head_dim=12,
      rope_dim=4,
      value_dim=10,
      latent_dim=14,
      query_dim=18,
      rope=Yarn(original=64, mscale=0.8, mscale_all=0.5),
    ),
  ),
  "experts": (AttentionExperts, AttentionExperts(3, 2, HEADS["stick_breaking"][1])),
  "binary_linear": (BinaryLinear, BinaryLinear(num_heads=2, num_kv_heads=1, head_dim=16)),
}
FFNS = {"moe": (MoEConfig, MoEConfig()), "mlp": (MLPConfig, MLPConfig(mlp_dim=32))}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """Attention, then a feed-forward part, each behind a norm and beside a residual."""

  attention: Any = choice(ATTENTION, SoftmaxAttention())
  ffn: Any = choice(FFNS, MoEConfig())

  def __post_init__(self) -> None:
    if isinstance(self.ffn, MoEConfig):
      self.ffn.check_causal()

  def build(
    self, init: Init, stream: ResidualStream, parallel: ParallelContext = ONE_DEVICE
  ) -> BlockLayer:
    """Returns the module with its weights."""
    return BlockLayer(self, init, stream, parallel)

  def active_params(self, dim: int) -> int:
    """Returns how many parameters of the block's matrices act on one token."""
    return self.attention.active_params(dim) + self.ffn.active_params(dim)


class BlockLayer(nnx.Module):
  """The pieces of a block; the feed-forward part is called `moe` or `mlp` after what it is."""

  def __init__(
    self,
    config: BlockConfig,
    init: Init,
    stream: ResidualStream,
    parallel: ParallelContext = ONE_DEVICE,
  ):
    self.parallel, self.stream, dim = parallel, stream, stream.dim
    self.attention_norm = stream.make_norm(init / "attention_norm")
    self.attention = config.attention.build(init / "attention", dim, stream.eps, parallel=parallel)
    self.ffn_norm = stream.make_norm(init / "ffn_norm")
    is_moe = isinstance(config.ffn, MoEConfig)
    self.moe = config.ffn.build(init / "moe", dim, parallel) if is_moe else None
    self.mlp = None if is_moe else SwiGLUMLP(init / "mlp", dim, config.ffn.mlp_dim)

  def __call__(
    self, x_BLD: jax.Array, previous_logits: Any, tokens: Tokens, cache: Cache, keys: Keys | None
  ) -> tuple[jax.Array, Any, Cache, dict[str, MoESums]]:
    """Returns the stream, logits for the next gate, the cache and sums, by part with experts.

    Parts are `moe` and `attention`.
    """
    sums: dict[str, MoESums] = {}
    with jax.named_scope("attention"):
      here = None if keys is None else keys / "attention"
      normed_BLD = self.parallel.all_gather_sequence(self.attention_norm(x_BLD))
      attended_BLD, cache, found = self.attention(normed_BLD, tokens, cache, here)
      if found is not None:
        sums["attention"] = found
      x_BLD = self.stream.add(x_BLD, self.parallel.reduce_tensor(attended_BLD))
    if self.mlp is not None:
      with jax.named_scope("mlp"):
        y_BLD = self.parallel.reduce_tensor(
          self.mlp(self.parallel.all_gather_sequence(self.ffn_norm(x_BLD)))
        )
        return self.stream.add(x_BLD, y_BLD), previous_logits, cache, sums
    assert self.moe is not None
    with jax.named_scope("moe"):
      y_BLD, previous_logits, sums["moe"] = self.moe(
        self.ffn_norm(x_BLD), tokens, previous_logits, keys
      )
    return self.stream.add(x_BLD, y_BLD), previous_logits, cache, sums
