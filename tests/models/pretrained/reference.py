"""What transformers makes of a tiny random model; needs `pip install '.[hf]'`."""

import contextlib
import io
import logging
import re
import warnings

import numpy as np

from tests.models.pretrained.cases import SIZES


def build(model_type, changes, seed=0):
  """A random model in float32; norms, biases and buffers too, so that a forgotten one shows."""
  import torch
  import transformers

  logging.getLogger("transformers").setLevel(logging.ERROR)
  transformers.utils.logging.disable_progress_bar()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **changes})
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
  for name, x in [*model.named_parameters(), *model.named_buffers()]:
    if re.search(r"norm.*weight$", name):
      x.data.uniform_(0.5, 1.5)
    elif name.endswith(("bias", "sinks")) or re.search(r"(gate|router)\.weight$", name):
      x.data.normal_(0, 0.5)
  return model.eval()


def save(model, folder, **options):
  with contextlib.redirect_stderr(io.StringIO()):
    model.save_pretrained(folder, **options)


def load(folder):
  import transformers

  with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return transformers.AutoModelForCausalLM.from_pretrained(
      folder, attn_implementation="eager", dtype="auto"
    ).eval()


def ids_of(shape, seed=0):
  return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape).astype(np.int32)


def forward(model, ids_BL, position_BL=None):
  """Logits (B, L, V) and the choices of each layer with a router, {depth: (T, A) sorted}."""
  import torch

  choices, hooks = {}, []
  for name, module in model.named_modules():
    depth = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.(gate|router)", name)
    if depth:
      note = lambda _, inputs, out, depth=int(depth[1]): choices.update({depth: out})  # noqa: E731
      hooks.append(module.register_forward_hook(note))
  ids = torch.tensor(ids_BL.astype(np.int64))
  position = None if position_BL is None else torch.tensor(position_BL.astype(np.int64))
  with torch.no_grad():
    # With a mask, positions that jump do not start another document.
    logits = model(ids, attention_mask=torch.ones_like(ids), position_ids=position).logits
  for hook in hooks:
    hook.remove()
  tables = {
    depth: next(x for x in out if x.dtype == torch.int64)
    for depth, out in choices.items()
    if isinstance(out, tuple)
  }
  sorted_choices = {
    depth: np.sort(x.reshape(-1, x.shape[-1]).numpy(), axis=1) for depth, x in tables.items()
  }
  return logits.numpy(), sorted_choices


def gradients(model, ids_BL):
  """The gradient of the mean loss by parameter, in transformers' names in memory."""
  import torch

  ids = torch.tensor(ids_BL.astype(np.int64))
  model.zero_grad()
  model(ids, labels=ids).loss.backward()
  return {
    name: (x.grad if x.grad is not None else torch.zeros_like(x)).numpy().copy()
    for name, x in model.named_parameters()
  }


def greedy(model, ids_BL, new):
  """Ids (B, new) that follow, and by how much each led its rival."""
  import torch

  ids = torch.tensor(ids_BL.astype(np.int64))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    out = model.generate(
      ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
      output_scores=True, return_dict_in_generate=True, use_cache=True,
    )  # fmt: skip
  top = torch.stack(out.scores, dim=1).topk(2, dim=-1).values.numpy()
  written = out.sequences[:, ids.shape[1] :].numpy().astype(np.int32)
  return written, (top[..., 0] - top[..., 1]).astype(np.float32)


def sure(model_type, changes, prompt, new):
  """The first random model that writes various ids without near ties: it, they, the margins.

  One with a tied head likes to write one id again and again, whatever its layers do.
  """
  for seed in range(100):
    model = build(model_type, changes, seed)
    written, margin = greedy(model, prompt, new)
    if margin.min() > 1e-2 and len(np.unique(written)) >= 6:
      return model, written, margin
  raise AssertionError(f"{model_type} {changes}: every model has near ties, or writes one id")
