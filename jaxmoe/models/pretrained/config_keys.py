"""Keys of config.json that families share, each group both ways: read, and written."""

from __future__ import annotations

from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.masks import DocumentMask, WindowMask
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.model_family import blocks, stack_of
from jaxmoe.models.pretrained.rope_config import read_rope, rope_keys
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.balance import LoadBalance
from jaxmoe.moe.layer import MoEConfig

ACTIVATIONS = "silu", "swish"


def decoder(config: ConfigReader, layers: list[BlockConfig], eps: float) -> TransformerConfig:
  """Returns the record of blocks by depth, with the sizes that every family has.

  Args:
    config: Of the checkpoint.
    layers: The blocks.
    eps: Of norms, where the config does not say it.
  """
  config.only("hidden_act", *ACTIVATIONS)
  return TransformerConfig(
    dim=config.get(int, "hidden_size"),
    stack=stack_of(layers),
    tied=config.get(bool, "tie_word_embeddings", default=False),
    norm_eps=config.get(float, "rms_norm_eps", default=eps),
  )


def decoder_keys(model: TransformerConfig) -> dict[str, Any]:
  """Returns the inverse of `decoder`."""
  return {
    "hidden_act": ACTIVATIONS[0],
    "hidden_size": model.dim,
    "num_hidden_layers": model.num_layers,
    "rms_norm_eps": model.norm_eps,
    "tie_word_embeddings": model.tied,
  }


def num_layers(config: ConfigReader) -> int:
  """Returns the number of blocks.

  Raises:
    InputError: it is no number of blocks.
  """
  number = config.get(int, "num_hidden_layers")
  if number < 1:
    raise InputError(f"{config.where}: num_hidden_layers={number} must be at least 1")
  return number


def attention(
  config: ConfigReader, window: int | None = None, theta: float = 10_000.0, **others: Any
) -> SoftmaxAttention:
  """Returns the attention of a layer.

  Args:
    config: Of the checkpoint.
    window: How many tokens a token sees, None for all.
    theta: The base of the rotary angles where the config does not say it.
    **others: More fields of the record.
  """
  num_heads = config.get(int, "num_attention_heads")
  theta, scaling = read_rope(config, theta)
  return SoftmaxAttention(
    num_heads=num_heads,
    num_kv_heads=config.get(int, "num_key_value_heads", default=num_heads),
    head_dim=config.get(
      int, "head_dim", default=config.get(int, "hidden_size") // max(num_heads, 1)
    ),
    mask=DocumentMask() if window is None else WindowMask(window),
    rope_theta=theta,
    rope=scaling,
    **others,
  )


def attention_keys(model: TransformerConfig) -> dict[str, Any]:
  """Returns the inverse of `attention` for the first block, all but the window."""
  of = blocks(model)[0].attention
  return {
    "num_attention_heads": of.num_heads,
    "num_key_value_heads": of.num_kv_heads,
    "head_dim": of.head_dim,
    **rope_keys(of.rope_theta, of.rope),
  }


def bias(config: ConfigReader, key: str = "attention_bias") -> str:
  """Returns what has a bias in attention where one key says it: nothing or all."""
  return "all" if config.get(bool, key, default=False) else "none"


def window_of(block: BlockConfig) -> int | None:
  """Returns how many tokens a block's attention sees, None for all."""
  mask = block.attention.mask
  return mask.size if isinstance(mask, WindowMask) else None


def balance(config: ConfigReader, default: float) -> tuple[LoadBalance, ...]:
  """Returns the loss that keeps experts even as the model is trained on, if there is one.

  That of transformers counts every choice, so it is `num_experts_per_tok` times ours.
  """
  weight = config.get(float, "router_aux_loss_coef", default=default)
  active = config.get(int, "num_experts_per_tok")
  return (LoadBalance(weight=weight * active),) if weight > 0 else ()


def balance_keys(moe: MoEConfig) -> dict[str, Any]:
  """Returns the inverse of `balance`."""
  weight = sum(term.weight for term in moe.balance if isinstance(term, LoadBalance))
  return {"router_aux_loss_coef": weight / moe.num_active}


def dense_layers(config: ConfigReader) -> list[bool]:
  """Returns which blocks of a Qwen MoE are dense: those named, and all but every n-th."""
  depths = range(num_layers(config))
  named = config.get(list, "mlp_only_layers", default=[])
  step = config.get(int, "decoder_sparse_step", default=1)
  if step < 1:
    raise InputError(f"{config.where}: decoder_sparse_step={step} must be at least 1")
  return [depth in named or (depth + 1) % step != 0 for depth in depths]


def dense_layers_keys(model: TransformerConfig) -> dict[str, Any]:
  """Returns the inverse of `dense_layers`."""
  dense = [depth for depth, ffn in enumerate(model.ffns) if isinstance(ffn, MLPConfig)]
  return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def windows(config: ConfigReader, after: int) -> list[int | None]:
  """Returns the window of each block, told by `layer_types` or, without it, by depth (Qwen).

  Args:
    config: Of the checkpoint.
    after: `max_window_layers` where the config does not say it: the first block with a window.
  """
  depths = range(num_layers(config))
  size = config.get(int, "sliding_window", default=4096)
  used = config.get(bool, "use_sliding_window", default=False)
  first = config.get(int, "max_window_layers", default=after)
  kinds = config.get(list, "layer_types", default=None)
  if kinds is None:
    return [size if used and depth >= first else None for depth in depths]
  return windows_of_types(config, kinds, size if used else None)


def windows_of_types(config: ConfigReader, kinds: list, size: int | None) -> list[int | None]:
  """Returns the window of each block by the entries of `layer_types`.

  Raises:
    InputError: an entry that is not known, too few, or a window without a size.
  """
  depths = num_layers(config)
  if len(kinds) != depths or not set(kinds) <= {"sliding_attention", "full_attention"}:
    raise InputError(
      f"{config.where}: layer_types={kinds} must name sliding_attention or full_attention for "
      f"each of {depths} layers"
    )
  if size is None and "sliding_attention" in kinds:
    raise InputError(f"{config.where}: layer_types has windows, and sliding_window no size")
  return [size if kind == "sliding_attention" else None for kind in kinds]


def windows_keys(model: TransformerConfig) -> dict[str, Any]:
  """Returns the inverse of `windows`."""
  sizes = [window_of(block) for block in blocks(model)]
  if not any(sizes):
    return {"use_sliding_window": False, "sliding_window": None}
  kinds = ["sliding_attention" if size else "full_attention" for size in sizes]
  size = next(size for size in sizes if size)
  return {"use_sliding_window": True, "sliding_window": size, "layer_types": kinds}
