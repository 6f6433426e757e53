"""llama.cpp as a side of a race: its server within this process, by the wheel xllamacpp.

Weights and cache are float32, so that it computes what we do. Threads that wait for work in a loop
would count as work, so they do not poll. It needs no JAX.
"""

from __future__ import annotations

import pathlib
import threading
from typing import Any

from jaxmoe.bench.sides.gguf import write_gguf
from jaxmoe.bench.sides.protocol import clocked, serve


class LlamaText:
  """Greedy continuations of prompts."""

  def __init__(self, folder: str, rows: int, slots: int, threads: int):
    import xllamacpp

    path = pathlib.Path(folder) / "weights.gguf"
    write_gguf(pathlib.Path(folder) / "weights", path)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = slots * rows, rows
    params.kv_unified = False
    params.n_gpu_layers, params.warmup = 0, True
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_ram_mib = 0
    for where in (params.cpuparams, params.cpuparams_batch):
      where.n_threads, where.poll = threads, 0
    self._server = xllamacpp.Server(params)

  def write(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Returns the likeliest next ids of each prompt, all of which go at once."""
    answers: list[Any] = [None] * len(prompts)

    def one(row: int) -> None:
      answers[row] = self._server.handle_completions({
        "prompt": prompts[row], "max_tokens": max_tokens, "temperature": 0.0, "cache_prompt": False,
        "ignore_eos": True,
      })  # fmt: skip

    threads = [threading.Thread(target=one, args=(row,)) for row in range(len(prompts))]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return [_tokens(answer) for answer in answers]

  def seconds(self, prompts: list[list[int]], max_tokens: int) -> list[float]:
    """Returns the seconds of `write`."""
    return clocked(lambda: self.write(prompts, max_tokens))


def _tokens(answer: dict[str, Any]) -> list[int]:
  """Returns the ids of an answer, whose words `gguf.py` made up: t17t4.

  Raises:
    RuntimeError: it is no answer but an error.
  """
  if "choices" not in answer:
    raise RuntimeError(f"llama.cpp: {answer.get('error', answer)}")
  return [int(word) for word in answer["choices"][0]["text"].split("t")[1:]]


def handlers() -> dict[str, Any]:
  """Returns what the side answers."""
  made: list[LlamaText] = []

  def prepare(kind: str, **fields: Any) -> dict[str, Any]:
    assert kind == "text", kind
    made.append(LlamaText(**fields))
    return {}

  def versions() -> dict[str, str]:
    import importlib.metadata

    return {"xllamacpp": importlib.metadata.version("xllamacpp")}

  return {
    "prepare": prepare,
    "versions": versions,
    "write": lambda **fields: made[-1].write(**fields),
    "seconds": lambda **fields: made[-1].seconds(**fields),
  }


if __name__ == "__main__":
  serve(("xllamacpp", "gguf", "safetensors"), handlers)
