"""Kinds of attention from their papers, in float64 NumPy, one query of one head at a time."""

import numpy as np

from tests.contracts.oracles import ropes


def sees(segment, query, key):
  return key <= query and segment[query] == segment[key] > 0


def rope(x, position, config, length):
  half, turned = x.shape[-1] // 2, x.copy()
  turns, gain = ropes.angles(config.rope, config.rope_theta, x.shape[-1], length)
  for pair in range(half):
    angle = position * turns[pair]
    one, two = x[..., pair].copy(), x[..., pair + half].copy()
    turned[..., pair] = one * np.cos(angle) - two * np.sin(angle)
    turned[..., pair + half] = two * np.cos(angle) + one * np.sin(angle)
  return turned * gain


def softmax(q, k, v, config, seen, sink):
  """One query q (H) over the seen keys k, values v (S, H); a sink is a key without a value."""
  score = k[seen] @ q * (config.scale or 1 / np.sqrt(len(q)))
  return np.exp(score) / (np.exp(score).sum() + np.exp(sink)) @ v[seen]


def stick_breaking(q, k, v, config, seen, sink):
  """ModuleFormer, section 2.2: key j gets beta_j prod_{l=j+1..i} (1 - beta_l)."""
  out = np.zeros(len(q))
  for j in seen:
    product = 1.0
    for later in seen:
      if later > j:
        product *= 1 - 1 / (1 + np.exp(-k[later] @ q / np.sqrt(len(q))))
    out += product / (1 + np.exp(-k[j] @ q / np.sqrt(len(q)))) * v[j]
  return out


MIXES = {"SoftmaxAttention": softmax, "StickBreaking": stick_breaking}


def turned(config, heads, segment):
  """Positions, where the kind has any: the place in the document."""
  if type(config).__name__ != "SoftmaxAttention":
    return heads
  return np.stack([
    rope(heads[t], place, config, len(segment)) for t, place in enumerate(positions(segment))
  ])


def positions(segment):
  """Each token's place in its document."""
  return [list(segment[:at]).count(segment[at]) for at in range(len(segment))]


def attend(config, q, k, v, segment, sinks=None):
  """q (L, N, H), k and v (L, K, H) before positions; returns (L, N, H)."""
  q, k = turned(config, q, segment), turned(config, k, segment)
  mix, out = MIXES[type(config).__name__], np.zeros(q.shape)
  group = q.shape[1] // k.shape[1]
  for query, head in np.ndindex(q.shape[:2]):
    seen = [key for key in range(len(segment)) if sees(segment, query, key)]
    if seen:
      sink = -np.inf if sinks is None else sinks[head]
      out[query, head] = mix(q[query, head], k[:, head // group], v[:, head // group], config,
                             seen, sink)  # fmt: skip
  return out


def heads(config, weights, x, segment):
  """Queries, keys and values of x (L, D), attention, the projection back."""
  q, k, v = (np.einsum("ld,dnh->lnh", x, weights[name]) for name in "qkv")
  if getattr(config, "bias", "none") != "none":
    q, k, v = q + weights["q_bias"], k + weights["k_bias"], v + weights["v_bias"]
  if getattr(config, "qk_norm", "none") == "all":
    q, k = (normed(part, weights[f"{name}_norm/scale"]) for name, part in (("q", q), ("k", k)))
  if getattr(config, "clip", None):
    q, k, v = (np.clip(part, -config.clip, config.clip) for part in (q, k, v))
  found = attend(config, q, k, v, segment, weights.get("sink_bias"))
  y = np.einsum("lnh,nhd->ld", found, weights["o"])
  return y + weights["o_bias"] if getattr(config, "bias", "none") == "all" else y


def normed(heads, scale):
  """OLMoE: one RMSNorm over what all heads of a token have, before they are cut into heads."""
  flat = heads.reshape(len(heads), -1)
  flat = flat / np.sqrt(np.mean(flat**2, -1, keepdims=True) + 1e-6) * scale.reshape(-1)
  return flat.reshape(heads.shape)


def latent(config, weights, x, segment):
  """DeepSeek-V2, appendix C: equations 37 to 47, a query of one head at a time."""

  def norm(of, scale):
    return of / np.sqrt(np.mean(of**2, -1, keepdims=True) + 1e-6) * scale

  def place(channels, t):
    order = [*range(0, config.rope_dim, 2), *range(1, config.rope_dim, 2)]
    channels = channels[..., order] if config.neighbours else channels
    return rope(channels, positions(segment)[t], config, len(x))

  size, out = config.head_dim, np.zeros(x.shape)
  low = x if config.query_dim is None else norm(x @ weights["q_down"], weights["q_norm/scale"])
  c = norm(x @ weights["down"], weights["norm/scale"])
  shared = [place(x[t] @ weights["k_rope"], t) for t in range(len(x))]
  magnitude = 0.1 * config.rope.mscale_all * np.log(config.rope.factor) + 1
  for t, head in np.ndindex(len(x), config.num_heads):
    seen = [key for key in range(len(x)) if sees(segment, t, key)]
    q = low[t] @ weights["q"][:, head]
    q = np.concatenate([q[:size], place(q[size:], t)])
    keys = [np.concatenate([c[s] @ weights["k"][:, head], shared[s]]) for s in seen]
    scores = np.exp(np.array(keys).reshape(-1, len(q)) @ q * magnitude**2 / np.sqrt(len(q)))
    if seen:
      found = scores / scores.sum() @ (c[seen] @ weights["v"][:, head])
      out[t] += found @ weights["o"][head]
  return out


def experts(config, weights, x, segment):
  """ModuleFormer, section 2: y = sum_a g_a W_o^a concat_heads(attention(W_q^a x, K, V))."""
  k, v = (np.einsum("ld,dkh->lkh", x, weights[f"experts/{name}"]) for name in "kv")
  out = np.zeros(x.shape)
  for expert in range(config.num_experts):
    q = np.einsum("ld,dnh->lnh", x, weights["experts/q"][expert])
    found = attend(config.heads, q, k, v, segment).reshape(len(x), -1)
    for token in np.flatnonzero(segment):
      logits = x[token] @ weights["router/gate/weight"]
      score = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
      chosen = np.argsort(-score, kind="stable")[: config.num_active]
      if expert in chosen:
        total = score[chosen].sum() if config.router.normalize else 1
        out[token] += score[expert] / total * found[token] @ weights["experts/o"][expert]
  return out


def binary_linear(config, weights, x, segment):
  """ShiftAddViT: shares by agreeing signs, and a depthwise convolution of values."""
  q, k, v = (np.einsum("ld,dnh->lnh", x, weights[name]) for name in "qkv")
  out, group = np.zeros(q.shape), q.shape[1] // k.shape[1]
  for query, head in np.ndindex(q.shape[:2]):
    mine, theirs = q[query, head] >= 0, k[:, head // group] >= 0
    seen = [key for key in range(len(segment)) if sees(segment, query, key)]
    agree = np.array([np.sum(mine == theirs[key]) for key in seen])
    if agree.sum() > 0:
      out[query, head] = agree / agree.sum() @ v[seen, head // group]
    for ago in range(config.conv_width):
      if sees(segment, query, query - ago) and query >= ago:
        near = weights["conv"][ago, head // group] * v[query - ago, head // group]
        out[query, head] += near
  return np.einsum("lnh,nhd->ld", out, weights["o"])


ORACLES = {
  "softmax": heads, "sinks": heads, "qk_norm": heads, "stick_breaking": heads, "experts": experts,
  "binary_linear": binary_linear, "latent": latent,
}  # fmt: skip
