"""XLA flags for programs that run once or twice: most of their time would go into compiling."""

import os

import jax

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.version.__version_info__ < (0, 11):  # a third of the time to compile; gone in later ones
  FLAGS += " --xla_cpu_use_fusion_emitters=false"


def compile_fast() -> None:
  """Makes XLA compile for CPU in less time, to slower programs; before the backend starts."""
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
