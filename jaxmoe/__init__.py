"""Mixture-of-Experts language models in JAX, as a library.

    import jaxmoe
    run = jaxmoe.fit(jaxmoe.recipe("quickstart", num_steps=200), "runs/q", on_step=print)
    run.generate(["def main("], max_tokens=64)

Importing this package imports nothing else, starts no backend and reads no environment: a name is
fetched when it is first used. The packages below it stand on levels; each imports only from lower
levels (README, "The tree").
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PLACES = {
  "BlockConfig": "models.block",
  "CheckpointError": "core.errors",
  "InputError": "core.errors",
  "MoEConfig": "moe.layer",
  "Run": "runs.run",
  "SoftmaxAttention": "models.attention",
  "TransformerConfig": "models.transformer",
  "convert": "runs.run",
  "fit": "runs.run",
  "from_pretrained": "runs.run",
  "nn": "nn:",
  "open": "runs.run:open_run",
  "recipe": "runs.recipe_loading",
}
"""The place of each public name: MODULE, MODULE:NAME if it is another there, MODULE: for itself."""

__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
  """Returns a public name, and fetches what it needs."""
  if name not in _PLACES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  place, colon, there = _PLACES[name].partition(":")
  module = importlib.import_module(f"{__name__}.{place}")
  value = module if colon and not there else getattr(module, there or name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
