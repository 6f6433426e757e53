"""Published speeds of others, on machines of theirs: read, not measured here."""

from __future__ import annotations

from jaxmoe.report.html import Html, join, table, tag

PUBLISHED = (
  ("MegaBlocks, dropless training, A100", "up to 1.40x Tutel, 2.4x dense Megatron-LM",
   "arXiv:2211.15841; README of databricks/megablocks"),
  ("ScatterMoE, no padding and no copies, A100", "more throughput, less memory than MegaBlocks",
   "arXiv:2403.08245"),
  ("Liger-Kernel, fused MoE layer of Qwen3-30B's shape, T=32,768, H100",
   "413 TFLOP/s forward and backward", "linkedin/Liger-Kernel pull request 1294"),
  ("PyTorch `_grouped_mm`, 16 x (128000 x 7168 x 7168), H200", "705 TFLOP/s",
   "pytorch/pytorch issue 156203"),
  ("DeepGEMM, fp8 products, H800", "up to 1550 TFLOP/s", "README of deepseek-ai/DeepGEMM"),
  ("MaxText, training Mixtral 8x7B, TPU v5p", "52.6 to 54.9% MFU",
   "AI-Hypercomputer/maxtext docs/reference/models/tiering.md"),
  ("Megatron-LM, training Qwen3-30B-A3B in bf16, H100", "240 TFLOP/s a GPU, 24% MFU",
   "NVIDIA/Megatron-LM issue 5728"),
  ("Comet, overlapped exchange", "1.96x a MoE layer, 1.71x end to end", "arXiv:2502.19811"),
  ("SGLang, Qwen3-30B-A3B in bf16, one row, one GPU", "490 tokens/s, prompt counted",
   "sgl-project/sglang issue 12614"),
)  # fmt: skip
"""(what, result, source) of each."""


def published() -> Html:
  """Returns the table, labelled as what it is."""
  label = (
    "Published by others, on other machines, models and days. Nothing of it was measured here, and "
    "none of it can be compared with the numbers above."
  )
  head = ["published by others", "what they report", "source"]
  return join(tag("p", label, class_="note"), table(head, [list(row) for row in PUBLISHED], 3))
