"""PyTorch with transformers as a side of a race, as fast as it is without a compiler.

Experts are `grouped_mm`, attention is SDPA, AdamW is the fused one, and decoding is a loop around
the model with its cache, without what `generate` does beside it. It needs no JAX.
"""

from __future__ import annotations

import pathlib
from typing import Any

from jaxmoe.bench.sides.protocol import clocked, serve


def load(folder: pathlib.Path) -> Any:
  """Returns the model of a checkpoint in float32."""
  import torch
  from transformers import AutoModelForCausalLM

  torch.set_grad_enabled(True)
  return AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, experts_implementation="grouped_mm", attn_implementation="sdpa"
  )


class TorchStep:
  """Training steps: loss and balance losses, clipping, AdamW."""

  def __init__(self, folder: str, recipe: dict[str, Any]):
    import numpy as np
    import torch

    self._recipe, self._folder = recipe, pathlib.Path(folder)
    self._model = load(self._folder / "weights")
    self._model.train()
    batch = np.load(self._folder / "batch.npz")
    self._ids = torch.from_numpy(batch["ids"]).long()
    self._labels = torch.from_numpy(batch["labels"]).long()
    plain = [p for name, p in self._model.named_parameters() if not self._decays(name)]
    rest = [p for name, p in self._model.named_parameters() if self._decays(name)]
    self._optimizer = torch.optim.AdamW(
      [{"params": plain, "weight_decay": 0.0}, {"params": rest}],
      lr=recipe["learning_rate"], betas=(recipe["b1"], recipe["b2"]), eps=recipe["eps"],
      weight_decay=recipe["weight_decay"], fused=True,
    )  # fmt: skip

  def first(self) -> dict[str, float]:
    """Does one step; returns its loss and norm, and how far moments are from those in the folder.

    That is, of the tensor where it is most, the norm of the difference over the norm.
    """
    import torch

    loss, norm = self._next(exact=True)
    expected = dict(load(self._folder / "moments").named_parameters())
    worst = 0.0
    with torch.no_grad():
      for name, parameter in self._model.named_parameters():
        moment = self._optimizer.state[parameter]["exp_avg"]
        size = torch.linalg.vector_norm(expected[name])
        off = torch.linalg.vector_norm(moment - expected[name]) / size
        worst = max(worst, float(off) if size > 0 else float(torch.linalg.vector_norm(moment)))
    return {"loss": float(loss), "norm": float(norm), "error": worst}

  def steps(self, number: int) -> list[float]:
    """Returns the seconds of so many steps."""
    return clocked(lambda: [self._next() for _ in range(number)])

  def _next(self, exact: bool = False) -> tuple[Any, Any]:
    """Does one step; returns its loss and its gradient's norm, if `exact` summed in float64."""
    import torch

    self._optimizer.zero_grad(set_to_none=True)
    out = self._model(input_ids=self._ids, output_router_logits=True, use_cache=False)
    logits = out.logits.reshape(-1, out.logits.shape[-1])
    loss = torch.nn.functional.cross_entropy(logits, self._labels.reshape(-1))
    loss = loss + sum(self._balance(one) for one in out.router_logits)
    loss.backward()
    gradients = [parameter.grad for parameter in self._model.parameters()]
    wide = [torch.linalg.vector_norm(one, dtype=torch.float64) for one in gradients if exact]
    norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._recipe["clip_norm"])
    self._optimizer.step()
    return loss.detach(), torch.linalg.vector_norm(torch.stack(wide)) if exact else norm

  def _balance(self, logits_TE: Any) -> Any:
    """Returns the balance losses of a layer: E * sum_i f_i p_i and the mean squared logsumexp."""
    import torch

    scores_TE = torch.softmax(logits_TE.float(), dim=-1)
    chosen = torch.topk(scores_TE, self._recipe["num_active"], dim=-1).indices.reshape(-1)
    num_experts = scores_TE.shape[1]
    share_E = torch.bincount(chosen, minlength=num_experts) / chosen.numel()
    load = num_experts * torch.sum(share_E * scores_TE.mean(0))
    z = torch.mean(torch.logsumexp(logits_TE.float(), dim=-1) ** 2)
    return self._recipe["load_balance"] * load + self._recipe["router_z"] * z

  def _decays(self, name: str) -> bool:
    return "norm" not in name and "embed_tokens" not in name


class TorchText:
  """Greedy continuations of prompts of one length."""

  def __init__(self, folder: str):
    self._model = load(pathlib.Path(folder) / "weights").eval()

  def write(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Returns the likeliest next ids of each prompt."""
    import torch
    from transformers import DynamicCache

    ids, cache, written = torch.tensor(prompts), DynamicCache(config=self._model.config), []
    with torch.inference_mode():
      for _ in range(max_tokens):
        out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        written.append(ids)
    return torch.cat(written, dim=1).tolist()

  def seconds(self, prompts: list[list[int]], max_tokens: int) -> list[float]:
    """Returns the seconds of `write`."""
    return clocked(lambda: self.write(prompts, max_tokens))


def _attention(given: Any) -> Any:
  """Returns causal attention of (B, L, N, H) arrays by SDPA, which wants (B, N, L, H)."""
  import torch

  sdpa = torch.nn.functional.scaled_dot_product_attention

  def call(*qkv: Any) -> Any:
    grouped = qkv[0].shape[2] != qkv[1].shape[2]
    heads = (x.transpose(1, 2) for x in qkv)
    return sdpa(*heads, is_causal=True, enable_gqa=grouped).transpose(1, 2)

  return call


def _grouped_matmul(given: Any) -> Any:
  """Returns rows (R, D) sorted by group times matrices (S, D, F) by `grouped_mm`."""
  import torch

  ends_S = given["counts"].cumsum(0).to(torch.int32)
  return lambda rows_RD, weight_SDF: torch.nn.functional.grouped_mm(
    rows_RD, weight_SDF, offs=ends_S
  )


def _cross_entropy(given: Any) -> Any:
  """Returns the loss of each of T tokens, of hidden states (T, D) and a head (D, V)."""
  import torch

  labels_T = given["labels"].long()
  return lambda hidden_TD, head_DV: torch.nn.functional.cross_entropy(
    hidden_TD @ head_DV, labels_T, reduction="none"
  )


OPERATIONS = {
  "attention": _attention,
  "grouped_matmul": _grouped_matmul,
  "cross_entropy": _cross_entropy,
}


class TorchOperation:
  """One of `OPERATIONS`, forward and backward, on a GPU where there is one."""

  def __init__(self, kind: str, path: str, dtype: str = "float32"):
    import numpy as np
    import torch

    self._there = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {
      name: torch.from_numpy(array).to(self._there) for name, array in np.load(path).items()
    }
    number, kept = sum(name.isdigit() for name in given), getattr(torch, dtype)
    self._args = [given[str(at)].to(kept).requires_grad_() for at in range(number)]
    self._call, self._cotangent = OPERATIONS[kind](given), given["cotangent"].to(kept)

  def values(self, path: str) -> dict[str, Any]:
    """Writes the output and the gradients."""
    import numpy as np

    found = {"out": self._both()}
    found |= {str(at): leaf.grad for at, leaf in enumerate(self._args)}
    plain = {name: one.detach().float().cpu().numpy() for name, one in found.items()}
    np.savez(path, **plain)
    return {}

  def passes(self, number: int) -> list[float]:
    """Returns the seconds of so many forward and backward passes."""
    return clocked(lambda: [self._both() for _ in range(number)])

  def _both(self) -> Any:
    import torch

    for leaf in self._args:
      leaf.grad = None
    out = self._call(*self._args)
    out.backward(self._cotangent)
    if self._there.type == "cuda":
      torch.cuda.synchronize()
    return out


def handlers() -> dict[str, Any]:
  """Returns what the side answers."""
  made: list[Any] = []
  kinds = {"step": TorchStep, "text": TorchText}

  def prepare(kind: str, **fields: Any) -> dict[str, Any]:
    made.append(kinds[kind](**fields) if kind in kinds else TorchOperation(kind, **fields))
    return {}

  def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}

  return {
    "prepare": prepare,
    "versions": versions,
    "first": lambda: made[-1].first(),
    "steps": lambda number: made[-1].steps(number),
    "write": lambda **fields: made[-1].write(**fields),
    "seconds": lambda **fields: made[-1].seconds(**fields),
    "values": lambda path: made[-1].values(path),
    "passes": lambda number: made[-1].passes(number),
  }


if __name__ == "__main__":
  serve(("torch", "transformers", "safetensors"), handlers)
