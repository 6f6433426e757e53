"""What the model tests share: a decoder written out in float64 NumPy, from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.masks import DocumentMask, WindowMask
from jaxmoe.moe.layer import MoEConfig
from tests.contracts.oracles import ropes


def _rms(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def _normed(x, weights, name, config):
  """The norm of this name: by the root mean square, or LayerNorm."""
  scale = weights[f"{name}/scale"]
  if config.norm == "rms":
    return _rms(x, scale, config.norm_eps)
  deviation = np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
  return (x - x.mean(-1, keepdims=True)) / deviation * scale + weights[f"{name}/bias"]


def _silu(x):
  return x / (1 + np.exp(-x))


def _swiglu(x, gate_up, down):
  gate, up = np.einsum("...d,dgf->g...f", x, gate_up)
  return (_silu(gate) * up) @ down


def _rope(x, position, config):
  """Turns pair (i, i + H/2) of each head by position * theta ** (-2 i / H), or as scaled."""
  half = x.shape[-1] // 2
  turned = x.copy()
  turns, gain = ropes.angles(config.rope, config.rope_theta, x.shape[-1], len(x))
  for pair in range(half):
    angle = position * turns[pair]
    first, second = x[..., pair], x[..., pair + half]
    turned[..., pair] = first * np.cos(angle)[:, None] - second * np.sin(angle)[:, None]
    turned[..., pair + half] = second * np.cos(angle)[:, None] + first * np.sin(angle)[:, None]
  return turned * gain


def _attention(x, weights, config, tokens, eps):
  q, k, v = (np.einsum("ld,dnh->lnh", x, weights[name]) for name in "qkv")
  if config.bias != "none":
    q, k, v = q + weights["q_bias"], k + weights["k_bias"], v + weights["v_bias"]
  for name, heads in (("q_norm", q), ("k_norm", k)):
    if config.qk_norm == "head":
      heads[:] = _rms(heads, weights[f"{name}/scale"], eps)
    if config.qk_norm == "all":
      flat = _rms(heads.reshape(len(x), -1), weights[f"{name}/scale"].ravel(), eps)
      heads[:] = flat.reshape(heads.shape)
  if config.clip is not None:
    q, k, v = (np.clip(heads, -config.clip, config.clip) for heads in (q, k, v))
  q, k = (_rope(heads, tokens["position"], config) for heads in (q, k))
  group, out = config.num_heads // config.num_kv_heads, np.zeros(q.shape)
  for query, head in np.ndindex(q.shape[:2]):
    seen = [key for key in range(query + 1) if _sees(config.mask, tokens["segment"], query, key)]
    if seen:
      scores = k[seen, head // group] @ q[query, head] * (config.scale or q.shape[-1] ** -0.5)
      total = np.exp(scores).sum() + (np.exp(weights["sink_bias"][head]) if config.sinks else 0)
      out[query, head] = np.exp(scores) / total @ v[seen, head // group]
  bias = weights["o_bias"] if config.bias == "all" else 0
  return np.einsum("lnh,nhd->ld", out, weights["o"]) + bias


def _sees(mask, segment, query, key):
  if segment[query] == 0 or segment[key] == 0:
    return False
  if isinstance(mask, WindowMask) and query - key >= mask.size:
    return False
  return segment[query] == segment[key] or not isinstance(mask, (DocumentMask, WindowMask))


def _gate(x, weights, before):
  """Returns logits; those of a residual gate are inner + before W_g."""
  if "router/gate/residual" not in weights:
    return x @ weights["router/gate/weight"]
  inner = x @ weights["router/gate/inner/weight"]
  return inner if before is None else inner + before @ weights["router/gate/residual"]


def _moe(x, weights, config, tokens, logits_of):
  """Every choice computed: the layer without drops."""
  out = np.zeros(x.shape)
  for token in np.flatnonzero(tokens["segment"]):
    logits = logits_of[token]
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    chosen = np.argsort(-scores, kind="stable")[: config.num_active]
    weight = scores[chosen] / (scores[chosen].sum() if config.router.normalize else 1)
    for expert, share in zip(chosen, weight, strict=True):
      gate_up, down = weights["experts/gate_up"][expert], weights["experts/down"][expert]
      out[token] += share * _swiglu(x[token], gate_up, down)
  if config.shared_mlp_dim:
    out += _swiglu(x, weights["shared/gate_up"], weights["shared/down"])
  return out


def _below(weights, prefix):
  return {name[len(prefix) :]: leaf for name, leaf in weights.items() if name.startswith(prefix)}


def _decoder(config, weights, row):
  """Returns logits (L, V) of one row: {'ids', 'position', 'segment'}, each (L,)."""
  x = weights["embed/table"][row["ids"]] * config.embed_scale
  blocks = [
    block for group in config.stack for _ in range(group.repeats) for block in group.pattern
  ]
  carried = None
  for depth, block in enumerate(blocks):
    layer, eps = _below(weights, f"layers/{depth}/"), config.norm_eps
    normed = _normed(x, layer, "attention_norm", config)
    y = _attention(normed, _below(layer, "attention/"), block.attention, row, eps)
    x = x + config.residual_scale * y
    normed = _normed(x, layer, "ffn_norm", config)
    if isinstance(block.ffn, MoEConfig):
      logits = _gate(normed, _below(layer, "moe/"), carried)
      carried = logits if block.ffn.router.gate.reads_previous else carried
      y = _moe(normed, _below(layer, "moe/"), block.ffn, row, logits)
    else:
      y = _swiglu(normed, layer["mlp/gate_up"], layer["mlp/down"])
    x = x + config.residual_scale * y
  x = _normed(x, weights, "final_norm", config)
  logits = x @ (weights["embed/table"].T if config.tied else weights["head/weight"])
  return logits * config.logit_scale + (weights["head/bias"] if config.head_bias else 0)


@pytest.fixture(scope="session")
def oracle_logits():
  """Returns a function (decoder, params, batch) -> float64 logits (B, L, V)."""

  def run(decoder, params, batch):
    flat = param_names.unstack(param_names.flatten(params), decoder.layer_groups)
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in flat.items()}
    rows = range(len(batch["ids"]))
    parts = [{key: np.asarray(field[row]) for key, field in batch.items()} for row in rows]
    return np.stack([_decoder(decoder.config, weights, part) for part in parts])

  return run


@pytest.fixture(scope="session")
def batch_of():
  """Returns a function from the documents' lengths of each row to a packed batch of random ids."""

  def make(rows, length, vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    shape = (len(rows), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("position", "segment")}
    for row, lengths in enumerate(rows):
      start = 0
      for document, size in enumerate(lengths, start=1):
        batch["segment"][row, start : start + size] = document
        batch["position"][row, start : start + size] = np.arange(size)
        start += size
    ids = rng.integers(0, vocab_size, shape).astype(np.int32)
    labels = np.where(batch["segment"] > 0, rng.integers(0, vocab_size, shape), -1)
    return {"ids": ids, "labels": labels.astype(np.int32), **batch}

  return make


@pytest.fixture(scope="session")
def perturbed_norms():
  """Returns parameters with scales away from one and biases from zero, so that all show."""

  def move(params):
    def at(path, leaf):
      if not getattr(path[-1], "key", "").endswith(("scale", "bias")):
        return leaf
      rng = np.random.default_rng(len(str(path)))
      return leaf + jnp.asarray(rng.uniform(-0.5, 0.5, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(at, params)

  return move


@pytest.fixture(scope="session")
def forward():
  """Returns a function (decoder, params, batch) -> logits, compiled once for each decoder."""
  compiled = {}

  def run(decoder, params, batch):
    if id(decoder) not in compiled:

      def logits(params, batch):
        hidden, _, _ = decoder.hidden(params, Tokens.of_batch(batch))
        return decoder.logits(params, hidden)

      compiled[id(decoder)] = (jax.jit(logits), decoder)
    return compiled[id(decoder)][0](params, {key: jnp.asarray(batch[key]) for key in batch})

  return run
