"""Small models in plain jnp whose layouts are found: (loss of parameters and batch, shapes)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

V, D, F, E, C, L, B, H, R = 32, 24, 40, 4, 8, 6, 4, 5, 12


def norm(scale, x):
  scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def attend(q_BLNH, k_BSKH, v_BSKH):
  """Grouped or not; by repeating keys, as many do."""
  groups = q_BLNH.shape[2] // k_BSKH.shape[2]
  k_BSNH, v_BSNH = (jnp.repeat(x, groups, axis=2) for x in (k_BSKH, v_BSKH))
  weights = jax.nn.softmax(jnp.einsum("blnh,bsnh->bnls", q_BLNH, k_BSNH), axis=-1)
  return jnp.einsum("bnls,bsnh->blnh", weights, v_BSNH)


def attention(p, x, memory=None):
  memory = x if memory is None else memory
  q, k, v = (
    (y @ p[name] + p.get(f"{name}_bias", jnp.zeros(1))[None, None]).reshape(*y.shape[:2], -1, H)
    for name, y in (("q", x), ("k", memory), ("v", memory))
  )
  y = attend(q, k, v)
  return y.reshape(*x.shape[:2], -1) @ p["o"]


def grouped(p, x):
  """Grouped queries without a copy of keys; kernels with a dim for heads."""
  q, k, v = (jnp.einsum("bld,dnh->blnh", x, p[name]) for name in "qkv")
  q = q.reshape(*q.shape[:2], k.shape[2], -1, H)
  weights = jax.nn.softmax(jnp.einsum("blkgh,bskh->bkgls", q, k), axis=-1)
  y = jnp.einsum("bkgls,bskh->blkgh", weights, v).reshape(*x.shape[:2], -1, H)
  return jnp.einsum("blnh,nhd->bld", y, p["o"])


def latent(p, x):
  """Keys and values from a narrow latent, with a norm between, and a shared rotated part."""
  c = norm(p["scale"], x @ p["down"])
  q = (x @ p["q"]).reshape(*x.shape[:2], -1, 2 * H)
  kv = (c @ p["up"]).reshape(*x.shape[:2], -1, 2 * H)
  k, v = jnp.split(kv, 2, axis=-1)
  shared = jnp.broadcast_to((x @ p["shared"])[:, :, None], k.shape)
  y = attend(q, jnp.concatenate([k, shared], -1), v)
  return y.reshape(*x.shape[:2], -1) @ p["o"]


def ffn(p, x):
  return (jax.nn.silu(x @ p["gate"] + p["bias"][None, None]) * (x @ p["up"])) @ p["down"]


def experts(p, x):
  """Top-2 with a capacity, by one-hot products (GShard), and a shared expert."""
  t = x.reshape(-1, D)
  scores = jax.nn.softmax(t @ p["router"])
  best, which = jax.lax.top_k(scores, 2)
  chosen = jax.nn.one_hot(which, E, dtype=jnp.int32)
  place = jnp.cumsum(chosen.sum(1), 0) - 1
  slot = jax.nn.one_hot(place, 2 * C)[:, None] * chosen[..., None]
  send, weigh = slot.sum(1), (slot * best[..., None, None]).sum(1)
  rows = jnp.einsum("tec,td->ecd", send, t)
  h = jax.nn.silu(jnp.einsum("ecd,edf->ecf", rows, p["gate"]) + p["inner_bias"][:, None])
  y = jnp.einsum("ecf,efd->ecd", h, p["down"])
  return jnp.einsum("tec,ecd->td", weigh, y).reshape(x.shape) + ffn(p["shared"], x)


def all_experts(p, x):
  scores = jax.nn.softmax(x @ p["router"])
  h = jax.nn.relu(jnp.einsum("bld,edf->blef", x, p["gate"]))
  return jnp.einsum("blef,efd,ble->bld", h, p["down"], scores)


def sorted_experts(p, x):
  t = x.reshape(-1, D)
  weight, which = jax.lax.top_k(jax.nn.sigmoid(t @ p["router"]), 2)
  order = jnp.argsort(which.reshape(-1))
  sizes = jnp.bincount(which.reshape(-1), length=E)
  h = jax.nn.relu(jax.lax.ragged_dot(t[order // 2], p["gate"], sizes))
  y = jax.lax.ragged_dot(h, p["down"], sizes)
  y = jnp.zeros_like(y).at[order].set(y).reshape(-1, 2, D)
  return jnp.einsum("tad,ta->td", y, weight).reshape(x.shape)


def scattered_experts(p, x):
  t = x.reshape(-1, D)
  which = jnp.argmax(t @ p["router"], -1)
  slot = which * 2 * C + jnp.cumsum(jax.nn.one_hot(which, E, dtype=int), 0)[:, 0]
  rows = jnp.zeros((E * 2 * C, D)).at[slot].set(t, mode="drop").reshape(E, 2 * C, D)
  h = jax.nn.relu(jnp.einsum("ecd,edf->ecf", rows, p["gate"]))
  y = jnp.einsum("ecf,efd->ecd", h, p["down"]).reshape(-1, D)
  return y.at[slot].get(mode="fill", fill_value=0).reshape(x.shape)


def picked_experts(p, x):
  t = x.reshape(-1, D)
  scores = t @ p["router"] + p.get("bias", jnp.zeros(E))[None]
  weight, which = jax.lax.top_k(jax.nn.softmax(scores), 2)
  h = jax.nn.relu(jnp.einsum("td,tadf->taf", t, p["gate"][which]))
  return jnp.einsum("taf,tafd,ta->td", h, p["down"][which], weight).reshape(x.shape)


def experts_in_turn(p, x):
  def body(y, of):
    gate, down, score = of
    return y + score[..., None] * (jax.nn.relu(x @ gate) @ down), None

  scores = jnp.moveaxis(jax.nn.softmax(x @ p["router"]), -1, 0)
  return jax.lax.scan(body, jnp.zeros_like(x), (p["gate"], p["down"], scores))[0]


def absorbed(p, x):
  """Latent attention in the form that never makes keys: a matrix for each head."""
  c = x @ p["down"]
  q = jnp.einsum("bld,dnh->blnh", x, p["q"])
  q = jnp.einsum("blnh,nrh->blnr", q, p["up_k"])
  weights = jax.nn.softmax(jnp.einsum("blnr,bsr->bnls", q, c), axis=-1)
  y = jnp.einsum("bnls,bsr->blnr", weights, c)
  y = jnp.einsum("blnr,nrh->blnh", y, p["up_v"])
  return jnp.einsum("blnh,nhd->bld", y, p["o"])


def fused_gate(p, x):
  gate, up = jnp.split(x @ p["both"], 2, -1)
  return (jax.nn.silu(gate) * up) @ p["down"]


def paired_gate(p, x):
  both = jnp.einsum("bld,dgf->blgf", x, p["both"])
  return (jax.nn.silu(both[..., 0, :]) * both[..., 1, :]) @ p["down"]


def embedded(p, batch, layer):
  x = p["embed"][batch["ids"]]

  def body(x, blocks):
    return layer(blocks, x), None

  x, _ = jax.lax.scan(body, x, p["blocks"])
  logits = norm(p["final"], x) @ p["head"]
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], -1)
  return -picked.mean()


def block(mixer, mlp, p, x):
  with jax.named_scope("attn"):
    x = x + mixer(p["attention"], norm(p["norm1"], x))
  with jax.named_scope("ffn"):
    return x + mlp(p["mlp"], norm(p["norm2"], x))


def encoder_decoder(p, batch):
  memory = p["embed"][batch["ids"]]
  for layer in p["encoder"]:
    memory = block(attention, ffn, layer, memory)
  x = p["embed"][batch["labels"]]
  for layer in p["decoder"]:
    x = block(lambda a, y: attention(a, y, memory), ffn, layer, x)
  logits = x @ p["embed"].T
  return (jax.nn.logsumexp(logits, -1) ** 2).mean() - logits.mean()


def mlp_shapes():
  return {"gate": (D, F), "up": (D, F), "down": (F, D), "bias": (F,)}


def attention_shapes(heads=4, kv=4):
  q, k = (heads * H,), (kv * H,)
  return {"q": (D, *q), "k": (D, *k), "v": (D, *k), "o": (*q, D), "q_bias": q, "v_bias": k}


def grouped_shapes(heads=8, kv=4):
  return {"q": (D, heads, H), "k": (D, kv, H), "v": (D, kv, H), "o": (heads, H, D)}


def latent_shapes():
  q = (D, 4 * 2 * H)
  up = {"up": (R, 4 * 2 * H), "shared": (D, H), "scale": (R,)}
  return {"q": q, "down": (D, R), **up, "o": (4 * H, D)}


def expert_shapes():
  of = {"gate": (E, D, F), "down": (E, F, D), "inner_bias": (E, F), "router": (D, E)}
  return {**of, "shared": mlp_shapes()}


def block_shapes(mixer, mlp):
  return {"attention": mixer, "mlp": mlp, "norm1": (D,), "norm2": (D,)}


def stacked(shapes):
  return jax.tree.map(lambda s: (2, *s), shapes, is_leaf=lambda s: isinstance(s, tuple))


def tree(mixer, mlp):
  blocks = stacked(block_shapes(mixer, mlp))
  return {"embed": (V, D), "blocks": blocks, "final": (D,), "head": (D, V)}


def decoder(mixer, mlp):
  return functools.partial(embedded, layer=functools.partial(block, mixer, mlp))


LAYER = block_shapes(attention_shapes(), mlp_shapes())
MODELS = {
  "dense": (decoder(attention, ffn), tree(attention_shapes(), mlp_shapes())),
  "repeated keys": (decoder(attention, ffn), tree(attention_shapes(8, 4), mlp_shapes())),
  "few keys": (decoder(attention, ffn), tree(attention_shapes(8, 2), mlp_shapes())),
  "grouped": (decoder(grouped, ffn), tree(grouped_shapes(), mlp_shapes())),
  "few groups": (decoder(grouped, ffn), tree(grouped_shapes(8, 2), mlp_shapes())),
  "latent": (decoder(latent, ffn), tree(latent_shapes(), mlp_shapes())),
  "experts": (decoder(attention, experts), tree(attention_shapes(), expert_shapes())),
  "encoder and decoder": (
    encoder_decoder, {"embed": (V, D), "encoder": [LAYER, LAYER], "decoder": [LAYER]},
  ),
}  # fmt: skip


def params_of(shapes, seed=0):
  leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
  rng = np.random.default_rng(seed)
  drawn = [
    jnp.asarray(rng.normal(0, 0.5 / shape[-2] ** 0.5 if len(shape) > 1 else 0.5, shape), "float32")
    for shape in leaves
  ]
  return treedef.unflatten(drawn)


def batch_of(seed=1):
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.integers(0, V, (B, L))) for name in ("ids", "labels")}
